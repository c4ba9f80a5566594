"""Multiway networks: several copies of a module, each for its own tokens (Wang et al., BEiT-3,
2022, section 2.1).

Shapes: B batch, T length.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from zeta.nn.config import AttentionConfig
from zeta.nn.projections import called
from zeta.nn.tables import Positions
from zeta.values import check_integer

Split: TypeAlias = int | Tensor
"""Which tokens go which way:

- an int or a 0-d integer tensor: tokens before this position go way ``A``, the others way ``B``. 0
  sends all to ``B``, and -1 all to ``A``;
- ``(B,)``: the same, one a sequence;
- ``(B, T)``: the way of each token, 0 for ``A``, 1 for ``B``, 2 for ``C`` and so on.
"""

MAX_WAYS = 26


class Ways(nn.Module):
    """Base of the multiway modules: ways named ``A``, ``B``, ``C`` ..., and how tokens find theirs.

    Every way gets a gradient in every backward pass, zeros where no token went, so that
    ``DistributedDataParallel`` finds no parameter unused.

    Under ``torch.compile`` every way computes every token and the results are selected from, so
    that another split is another value of a tensor and not another graph. An int as a call's
    ``split_position`` is first compiled in, as torch does with ints, and made variable at the
    second value; a 0-d tensor is variable at once.

    Args:
        ways: One module a way. They are used as they are, not copied.
        dim: Dimension of the input along which tokens lie.

    Raises:
        TypeError: A way is no module, or ``dim`` no integer.
        ValueError: There are fewer than two ways, or more than the alphabet has letters.
    """

    def __init__(self, ways: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        check_integer("dim", dim)
        for way in ways:
            _check_module("a way", way)
        if not 2 <= len(ways) <= MAX_WAYS:
            raise ValueError(f"a multiway module must have 2 to {MAX_WAYS} ways; got {len(ways)}")
        self.dim = dim
        self._names = tuple(chr(ord("A") + way) for way in range(len(ways)))
        for name, way in zip(self._names, ways, strict=True):
            self.add_module(name, way)
        self.split_position = -1

    @property
    def split_position(self) -> Split:
        """The `Split` of calls that bring none, -1 at first. Not in the state dict."""
        return self._split

    @split_position.setter
    def split_position(self, split: Split) -> None:
        check_split("split_position", split)
        self._split = split
        self._place_split()

    def _place_split(self) -> None:
        # Not a buffer: DistributedDataParallel would send rank 0's to all ranks, and `to_empty`
        # would leave it undefined.
        parameter = next(self.parameters(), None)
        device = None if parameter is None else parameter.device
        self._split_tensor = torch.as_tensor(self._split, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Ways":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        self._place_split()
        return self

    def forward(
        self,
        x: Tensor,
        *,
        split_position: Split | None = None,
        token_positions: Positions = 0,
        **kwargs: Any,
    ) -> Tensor:
        """Send each token its way.

        Args:
            x: Tokens along ``dim``; for a split with a batch dimension ``(B, T, ...)`` and
                ``dim=1``.
            split_position: The `Split` of this call; by default the module's own.
            token_positions: Where the tokens stand: the position of the first, as when earlier ones
                are in a cache, or ``(T,)`` or ``(1 or B, T)`` positions.
            **kwargs: Handed to every way.

        Returns:
            The ways' outputs, each token in its place.

        Raises:
            TypeError: The split is neither an int nor an integer or bool tensor.
            ValueError: Its shape does not fit ``x``, it is on another device, or it names a way
                that is not there.
        """
        if split_position is not None:
            check_split("split_position", split_position)
        if not torch.compiler.is_compiling():
            split = self._split if split_position is None else split_position
            if isinstance(split, int) and isinstance(token_positions, int):
                return self._slices(x, split, token_positions, kwargs)
        if split_position is None and self._split_tensor.device != x.device:
            # Parameters may have been assigned, of which no `_apply` told.
            self._place_split()
        split = self._split_tensor if split_position is None else split_position
        return self._select(x, split, token_positions, kwargs)

    def _slices(self, x: Tensor, split: int, first: int, kwargs: dict[str, Any]) -> Tensor:
        """Tokens before the split the first way, the others the second, each computed once."""
        length = x.shape[self.dim]
        border = length if split == -1 else min(max(split - first, 0), length)
        sizes = (border, length - border, *(0 for _ in self._names[2:]))
        parts = []
        for name, part in zip(self._names, torch.split(x, list(sizes), dim=self.dim), strict=True):
            # A way without tokens runs on none of them for the sake of its gradient.
            if part.shape[self.dim] or torch.is_grad_enabled():
                parts.append(called(getattr(self, name), part, **kwargs))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)

    def _select(
        self, x: Tensor, split: Split, positions: Positions, kwargs: dict[str, Any]
    ) -> Tensor:
        """Every way computes every token, and each token is taken from its way."""
        if not isinstance(split, Tensor):
            # As a tensor it is never a constant of a compiled graph.
            split = torch.full((), split, device=x.device)
        ways = way_ids(split, x, self.dim, positions)
        check_way_ids(ways, len(self._names))
        selected: Tensor | None = None
        for way, name in enumerate(self._names):
            chosen = ways == way
            # Integers are looked up: a way must not meet another one's vocabulary.
            tokens = x if x.is_floating_point() else x.where(_over(chosen, x, self.dim), 0)
            out = called(getattr(self, name), tokens, **kwargs)
            selected = (
                out
                if selected is None
                else torch.where(_over(chosen, out, self.dim), out, selected)
            )
        assert selected is not None
        return selected


class MultiwayNetwork(Ways):
    """A module with a copy for each further way.

    ``x[:, :split]`` goes through ``A``, the module itself, the rest through ``B``, a copy with new
    parameters::

        >>> network = MultiwayNetwork(nn.Linear(8, 4))
        >>> network(torch.zeros(2, 6, 8), split_position=4).shape
        torch.Size([2, 6, 4])

    Args:
        module: The first way. Its copies are initialised anew by their ``reset_parameters``.
        dim: Dimension of the input along which tokens lie.
        num_ways: Ways, together with the first.

    Raises:
        TypeError: ``module`` is none, or a number no integer.
        ValueError: There are fewer than two ways, or more than the alphabet has letters.
    """

    def __init__(self, module: nn.Module, dim: int = 1, *, num_ways: int = 2) -> None:
        _check_module("module", module)
        check_integer("num_ways", num_ways)
        super().__init__([module, *(_anew(module) for _ in range(num_ways - 1))], dim)


class MultiwayEmbedding(Ways):
    """A multiway module made of given modules, usually embeddings of different vocabularies.

    Args:
        modules: One a way.
        dim: Dimension of the input along which tokens lie.

    Raises:
        TypeError: ``modules`` is no sequence of modules, or ``dim`` no integer.
        ValueError: There are fewer than two, or more than the alphabet has letters.
    """

    def __init__(self, modules: Sequence[nn.Module], dim: int = 1) -> None:
        if not isinstance(modules, Sequence | nn.ModuleList):
            raise TypeError(
                f"modules must be a sequence of modules, one a way; got {type(modules).__name__}"
            )
        super().__init__(modules, dim)


def MultiwayWrapper(args: Any, module: nn.Module, dim: int = 1) -> nn.Module:
    """``module`` itself, or a `MultiwayNetwork` of it if ``args.multiway`` says so.

    Args:
        args: As for `AttentionConfig`.
        module: The first way.
        dim: Dimension of the input along which tokens lie.

    Raises:
        TypeError: ``module`` is none, or as `AttentionConfig.from_args`.
        ValueError: As `AttentionConfig.from_args`.
    """
    _check_module("module", module)
    num_ways = AttentionConfig.from_args(args).num_ways
    return module if num_ways == 1 else MultiwayNetwork(module, dim, num_ways=num_ways)


def set_split_position(position: Split) -> Callable[[nn.Module], None]:
    """A function for ``nn.Module.apply`` that sets the split of every multiway module inside.

    ``model.apply(set_split_position(3))``: the first three tokens go way ``A``.

    Args:
        position: A `Split`.
    """

    def apply(module: nn.Module) -> None:
        if hasattr(module, "split_position"):
            setattr(module, "split_position", position)  # noqa: B010 - whatever module that is

    return apply


def _check_module(name: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a module; got {type(module).__name__}")


def check_split(name: str, split: object) -> None:
    """Raise unless ``split`` is a `Split` by itself; whether it fits an input shows in the call."""
    if isinstance(split, Tensor):
        if split.is_floating_point() or split.is_complex():
            raise TypeError(f"{name} must be an int or an integer tensor; got {split.dtype}")
        if split.dim() > 2:
            raise ValueError(
                f"{name} must be 0-d, (batch,) or (batch, length); got {tuple(split.shape)}"
            )
    elif isinstance(split, bool) or not isinstance(split, int | torch.SymInt):
        raise TypeError(f"{name} must be an int or an integer tensor; got {type(split).__name__}")
    elif not torch.compiler.is_compiling() and split < -1:
        raise ValueError(f"{name} must be a position, or -1 for all on way A; got {split}")


def way_ids(split: Tensor, x: Tensor, dim: int, positions: Positions = 0) -> Tensor:
    """The way of each token: ``(1 or B, T)``, integers or bool.

    Args:
        split: A `Split` that is a tensor.
        x: The tokens, along ``dim``.
        dim: See ``x``.
        positions: Of the first token, or of all.

    Raises:
        ValueError: The split is not for this batch or this length, or on another device.
    """
    batch, length = x.shape[0], x.shape[dim]
    if split.dim() and dim % x.dim() != 1:
        raise ValueError(f"a split of each sequence or token needs dim=1; got dim={dim}")
    if split.dim() and split.device != x.device:
        raise ValueError(
            f"split_position must be on the tokens' device {x.device}; got {split.device}"
        )
    if split.dim() == 2:
        if split.shape != (batch, length):
            raise ValueError(
                f"split_position must give the way of each of ({batch}, {length}) tokens; "
                f"got {tuple(split.shape)}"
            )
        return split
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions, positions + length, device=x.device)
    if split.dim() == 1:
        if split.shape != (batch,):
            raise ValueError(
                f"split_position must have one entry for each of {batch} sequences; "
                f"got {len(split)}"
            )
        split = split[:, None]
    ids = (positions >= split) & (split != -1)
    return ids if ids.dim() == 2 else ids[None]


def check_way_ids(ways: Tensor, num_ways: int) -> None:
    """Raise ValueError for a way that is not there; on an accelerator its own assertion, later."""
    if ways.dtype == torch.bool:
        return
    known = ((ways >= 0) & (ways < num_ways)).all()
    message = f"split_position must give ways 0 to {num_ways - 1}"
    if torch.compiler.is_compiling() or ways.device.type != "cpu":
        torch._assert_async(known, message)
    elif not known:
        raise ValueError(f"{message}; got {int(ways.min())} to {int(ways.max())}")


def _over(chosen: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """``(1 or B, T)`` laid over the batch and token dimensions of ``tensor``."""
    if chosen.shape[0] == 1:
        return chosen[0].view([-1 if d == dim % tensor.dim() else 1 for d in range(tensor.dim())])
    return chosen.view(*chosen.shape, *(1 for _ in range(tensor.dim() - 2)))


def _anew(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with new parameters, where it knows how to draw them."""
    duplicate = copy.deepcopy(module)
    # What a module draws for its parts is not to be drawn anew by them.
    for part in reversed(list(duplicate.modules())):
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return duplicate
