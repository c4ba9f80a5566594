"""Rotations of queries and keys by their positions: `RotaryEmbedding` and `XPos`.

Tables are made in float32 (float64 for a float64 input) whatever the dtype of the module, and the
rotation itself is done in that precision.

Shapes: B batch, H heads, L length, D head dimension.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zeta.nn.scalings import Scaling
from zeta.nn.tables import (
    Positions,
    decaying_tables,
    exponents,
    kept_rotation_tables,
    kept_xpos_tables,
    looked_up,
    position_tensor,
    position_tensors,
    rotation_tables,
    xpos_tables,
)
from zeta.ops.rotation import Table, rotate_both, rotate_one
from zeta.positions import xpos_rates, xpos_scale
from zeta.values import (
    check_flag,
    check_floating,
    check_integer,
    check_positions_shape,
    check_positive,
    check_size,
    check_tensor,
    wide_dtype,
)


class Rotation(nn.Module):
    """Base of what ``position=`` of an attention takes.

    ``anchor`` is any position; the same one for queries and keys leaves the scores as they are.
    """

    head_dim: int

    def queries(self, x: Tensor, positions: Positions, anchor: int = 0) -> Tensor:
        """Rotated queries, the shape and dtype of ``x``, ``(B, H, L, D)``."""
        raise NotImplementedError

    def keys(self, x: Tensor, positions: Positions, anchor: int = 0) -> Tensor:
        """Rotated keys, the shape and dtype of ``x``, ``(B, H, L, D)``."""
        raise NotImplementedError

    def pair(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """`queries` and `keys` of the same tokens."""
        return self.queries(query, positions), self.keys(key, positions)


class RotaryEmbedding(Rotation):
    """Rotary position embeddings (Su et al., RoFormer, 2021, section 3.2.2).

    Args:
        head_dim: Features of a head.
        base: Wavelengths go from ``2 * pi`` positions to nearly ``2 * pi * base``.
        interleaved: Features ``(2p, 2p + 1)`` are a pair, as in RoFormer and TorchScale. False
            pairs ``(p, p + rotary_dim / 2)``, as the checkpoints of GPT-NeoX and Llama in
            Transformers do.
        rotary_dim: Rotate the first ``rotary_dim`` features only; all by default.
        scaling: A `LinearScaling`, `Llama3Scaling` or `YarnScaling`, for models that were taken to
            longer sequences than they first were trained on. None: frequencies are powers of
            ``base``.

    Raises:
        TypeError: ``scaling`` is something else, a dimension no integer, ``base`` no number or
            ``interleaved`` neither True nor False.
        ValueError: ``rotary_dim`` is odd, not positive, or more than ``head_dim``; ``base`` is not
            positive and finite.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = True,
        rotary_dim: int | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__()
        check_integer("head_dim", head_dim)
        check_flag("interleaved", interleaved)
        self.head_dim = head_dim
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        _check_pairs("head_dim" if rotary_dim is None else "rotary_dim", self.rotary_dim)
        if self.rotary_dim > head_dim:
            raise ValueError(f"rotary_dim must be at most head_dim = {head_dim}; got {rotary_dim}")
        check_positive("base", base)
        if scaling is not None and not isinstance(scaling, Scaling):
            raise TypeError(
                "scaling must be a LinearScaling, a Llama3Scaling or a YarnScaling; "
                f"got {type(scaling).__name__}"
            )
        self.base = base
        self.interleaved = interleaved
        self.scaling = scaling

    def forward(self, x: Tensor, offset: int = 0, *, positions: Tensor | None = None) -> Tensor:
        """Rotate queries or keys.

        Args:
            x: ``(..., L, D)``; ``(B, H, L, D)`` for positions with a batch dimension.
            offset: Position of the first token.
            positions: ``(L,)`` or ``(1 or B, L)`` integers, in place of ``offset``.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            TypeError: ``x`` is not floating point, or positions are no tensor.
            ValueError: A shape is wrong.
        """
        _check_tokens(x, self.head_dim, offset, positions)
        return self._turn(x, offset if positions is None else positions)

    def queries(self, x: Tensor, positions: Positions, anchor: int = 0) -> Tensor:
        """See `Rotation`."""
        return self._turn(x, positions)

    def keys(self, x: Tensor, positions: Positions, anchor: int = 0) -> Tensor:
        """See `Rotation`."""
        return self._turn(x, positions)

    def pair(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """See `Rotation`: both by one table."""
        table = self._tables(key, positions)
        return rotate_both(query, key, table, table, interleaved=self.interleaved)

    def _turn(self, x: Tensor, positions: Positions) -> Tensor:
        return rotate_one(x, self._tables(x, positions), interleaved=self.interleaved)

    def _tables(self, x: Tensor, positions: Positions) -> Table:
        dtype = wide_dtype(x.dtype)
        form = self.rotary_dim, self.base, self.scaling, dtype
        place = looked_up(x, positions)
        if place is not None:
            return kept_rotation_tables(*form, place)
        return rotation_tables(*form, position_tensor(positions, x.shape[-2], x.device))


class XPos(Rotation):
    """xPos: rotary embeddings with a decay (Sun et al., A Length-Extrapolatable Transformer, 2022).

    The scores are TorchScale's. TorchScale measures the decay from the middle of whatever it is
    given, which only cancels if queries and keys are equally many; here both are measured from
    an anchor, so that a key is rotated once and can be kept; further from it than `reach`, the
    attention counts from another.

    Its buffer ``scale`` is in the state dict because it is in TorchScale's. It is never read: it
    takes the dtype of the module, and the tables do not.

    Args:
        head_dim: Features of a head; even.
        scale_base: Positions over which a feature decays by its factor, 0.29 to 1.
        device: Of the buffer.

    Raises:
        TypeError: ``head_dim`` is no integer, or ``scale_base`` no number.
        ValueError: ``head_dim`` is odd or not positive, or ``scale_base`` not positive and finite.
    """

    scale: Tensor

    def __init__(
        self,
        head_dim: int,
        scale_base: float = 512,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_pairs("head_dim", head_dim)
        check_positive("scale_base", scale_base)
        self.head_dim = head_dim
        self.scale_base = scale_base
        self.register_buffer("scale", self._factors(device))

    def _factors(self, device: torch.device | str | None) -> Tensor:
        return xpos_scale(torch.ones((), device=device), self.head_dim, scale_base=1.0)

    def reset_parameters(self) -> None:
        """Fill the buffer: FSDP asks that of whatever has one and was made without memory."""
        self.scale.copy_(self._factors(self.scale.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "XPos":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        # `to_empty` would leave it undefined.
        self.scale = self._factors(self.scale.device).to(self.scale.dtype)
        return self

    def forward(
        self,
        x: Tensor,
        offset: int = 0,
        downscale: bool = False,
        *,
        positions: Tensor | None = None,
        anchor: Positions = 0,
    ) -> Tensor:
        """Rotate and scale queries or keys.

        Args:
            x: ``(..., L, D)``; ``(B, H, L, D)`` for positions with a batch dimension.
            offset: Position of the first token.
            downscale: True for keys, False for queries.
            positions: ``(L,)`` or ``(1 or B, L)`` integers, in place of ``offset``.
            anchor: The position whose scale is 1, but for a factor of at most ``sqrt(2)``: one for
                all, or one for each, ``(L,)`` or ``(1 or B, L)``. Another anchor changes the scale
                by powers of two, and so no digit of the result. Positions further than `reach` from
                it cannot be represented.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            TypeError: ``downscale`` is neither True nor False, ``x`` is not floating point, or
                positions are no tensor.
            ValueError: A shape is wrong, or a position that ``offset`` implies is out of reach.
        """
        _check_tokens(x, self.head_dim, offset, positions)
        check_flag("downscale", downscale)
        return self._turn(
            x, offset if positions is None else positions, anchor, -1 if downscale else 1
        )

    def queries(
        self, x: Tensor, positions: Positions, anchor: Positions = 0, origin: Tensor | None = None
    ) -> Tensor:
        """See `Rotation`.

        Args:
            x, positions: As there.
            anchor: As in `forward`, counted from ``origin``.
            origin: ``(1 or B,)``, the position from which the decay counts; 0 by default.
        """
        return self._turn(x, positions, anchor, 1, origin)

    def keys(
        self, x: Tensor, positions: Positions, anchor: Positions = 0, origin: Tensor | None = None
    ) -> Tensor:
        """See `queries`."""
        return self._turn(x, positions, anchor, -1, origin)

    def reach(self, dtype: torch.dtype) -> int:
        """How far from its anchor a position can be before features of size 1 overflow.

        With a ``scale_base`` of 512: 36,000 positions in float32 and bfloat16, 4,200 in float16.
        """
        largest = math.log(torch.finfo(dtype).max / 2.0)
        return int(self.scale_base * largest / math.log(1.4 / 0.4))

    def exponents(self, anchor: Positions, device: torch.device) -> Tensor:
        """By which powers of two anchors divide the scale of queries and multiply that of keys.

        Returns:
            ``(..., D / 2)`` float64 integers for anchors ``(...)``.
        """
        rates_P = xpos_rates(self.head_dim, scale_base=self.scale_base, device=device)
        return exponents(anchor, rates_P)

    def _check_reach(self, x: Tensor, first: int, anchor: int) -> None:
        if torch.compiler.is_compiling():
            return
        furthest = max(abs(first - anchor), abs(first + x.shape[-2] - 1 - anchor))
        if furthest > self.reach(x.dtype):
            raise ValueError(
                f"xPos reaches {self.reach(x.dtype)} positions in {x.dtype} with "
                f"scale_base={self.scale_base}; got one {furthest} from position {anchor}"
            )

    def both(
        self,
        query: Tensor,
        key: Tensor,
        positions: Positions,
        anchor: Positions = 0,
        origin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`queries` and `keys` of the same tokens, for little more than one of them."""
        if isinstance(positions, int) and isinstance(anchor, int):
            self._check_reach(key, positions, anchor)
        place = looked_up(key, positions, anchor, origin)
        form = self.head_dim, self.scale_base, key.dtype
        if place is not None:
            of_queries, of_keys = kept_xpos_tables(*form, place)
        else:
            of_queries, of_keys = xpos_tables(
                *form, *position_tensors(key, positions, anchor), origin
            )
        return rotate_both(query, key, of_queries, of_keys)

    def _turn(
        self,
        x: Tensor,
        positions: Positions,
        anchor: Positions,
        sign: int,
        origin: Tensor | None = None,
    ) -> Tensor:
        if isinstance(positions, int) and isinstance(anchor, int):
            self._check_reach(x, positions, anchor)
        cos, sin, power = decaying_tables(
            self.head_dim, self.scale_base, x.dtype, *position_tensors(x, positions, anchor), origin
        )
        scale = power.mul_(sign).exp2_().to(cos.dtype)
        return rotate_one(x, (cos * scale, sin * scale))


XPOS = XPos
"""TorchScale's spelling."""


def _check_tokens(x: Tensor, head_dim: int, offset: int, positions: Tensor | None) -> None:
    check_floating("x", x)
    if x.dim() < 2 or x.shape[-1] != head_dim:
        raise ValueError(f"x must have shape (..., length, {head_dim}); got {tuple(x.shape)}")
    if positions is None:
        check_integer("offset", offset)
        return
    check_tensor("positions", positions)
    if positions.dim() == 2 and x.dim() != 4:
        raise ValueError(
            f"x must be (batch, heads, length, {head_dim}) for positions with a batch dimension; "
            f"got {tuple(x.shape)}"
        )
    check_positions_shape("positions", positions.shape, x.shape[0], x.shape[-2])


def _check_pairs(name: str, dim: int) -> None:
    check_size(name, dim)
    if dim % 2:
        raise ValueError(f"rotations turn pairs of features: {name} must be even; got {dim}")
