"""`Form`: what an attention is, apart from the numbers in its parameters."""

import dataclasses
import math
from collections.abc import Mapping

from torch import Tensor, nn

from zeta.convert.errors import ConversionError
from zeta.nn import MultiheadAttention, RotaryEmbedding, XPos
from zeta.nn.initialization import ways_of
from zeta.nn.norms import QueryKeyNorm, RMSNorm, UnitNorm
from zeta.nn.scalings import Scaling

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
WITH_BIASES = frozenset(PROJECTIONS)
WITHOUT_BIASES: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Arguments of a `RotaryEmbedding`."""

    base: float = 10000.0
    interleaved: bool = True
    rotary_dim: int | None = None
    scaling: Scaling | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The arguments that make an attention, each as it takes effect.

    Attributes:
        biases: The projections that have one.
        scale: Factor of the scores; None: ``1 / sqrt(head_dim)``.
        xpos_scale_base: None: without xPos.
        num_ways: 1: without multiway.
        split_position: Of multiway modules.

    The others are those of `zeta.nn.MultiheadAttention`.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kdim: int
    vdim: int
    biases: frozenset[str] = WITH_BIASES
    dropout: float = 0.0
    scale: float | None = None
    self_attention: bool = False
    encoder_decoder_attention: bool = False
    subln: bool = False
    layernorm_eps: float = 1e-5
    xpos_scale_base: float | None = None
    rotary: Rotary | None = None
    window: int | None = None
    num_ways: int = 1
    split_position: int = -1
    qk_norm: QueryKeyNorm | None = None
    add_bias_kv: bool = False
    add_zero_attn: bool = False

    @classmethod
    def plain(cls, embed_dim: int, num_heads: int, **options: object) -> "Form":
        """A form whose heads share ``embed_dim``, unless ``options`` say otherwise."""
        sizes: dict[str, object] = {
            "num_kv_heads": num_heads,
            "head_dim": embed_dim // num_heads,
            "kdim": embed_dim,
            "vdim": embed_dim,
        }
        return cls(embed_dim=embed_dim, num_heads=num_heads, **{**sizes, **options})  # type: ignore[arg-type]  # by name

    @classmethod
    def of(cls, attention: MultiheadAttention) -> "Form":
        """The form of a module of Zeta's.

        Raises:
            ConversionError: It rotates in a way of the user's own, or its ways have no one split.
        """
        position, rotary, xpos_scale_base = attention.xpos, None, None
        if isinstance(position, XPos):
            xpos_scale_base = position.scale_base
        elif isinstance(position, RotaryEmbedding):
            part = None if position.rotary_dim == position.head_dim else position.rotary_dim
            rotary = Rotary(position.base, position.interleaved, part, position.scaling)
        elif position is not None:
            raise ConversionError(f"position={type(position).__name__} cannot be converted")
        norm = next((ways[0] for ways in [_ways(attention.inner_attn_ln)] if ways), None)
        natural = 1.0 / math.sqrt(attention.head_dim)
        return cls(
            embed_dim=attention.embed_dim,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            kdim=attention.kdim,
            vdim=attention.vdim,
            biases=frozenset(
                name for name in PROJECTIONS if _ways(getattr(attention, name))[0].bias is not None
            ),
            dropout=attention.dropout,
            scale=None if math.isclose(attention.scale, natural) else attention.scale,
            self_attention=attention.self_attention,
            encoder_decoder_attention=attention.encoder_decoder_attention,
            subln=norm is not None,
            layernorm_eps=norm.eps if isinstance(norm, nn.LayerNorm) else 1e-5,
            xpos_scale_base=xpos_scale_base,
            rotary=rotary,
            window=attention.window,
            num_ways=len(_ways(attention.q_proj)),
            split_position=split_position_of(attention),
            qk_norm=_qk_norm(attention),
            add_bias_kv=attention.bias_k is not None,
            add_zero_attn=attention.add_zero_attn,
        )

    def build(self) -> MultiheadAttention:
        """An attention of this form, its parameters on the meta device: without numbers.

        Raises:
            ConversionError: There is no such attention in Zeta.
        """
        rotary = self.rotary
        try:
            attention = MultiheadAttention(
                {
                    "multiway": 0 if self.num_ways == 1 else self.num_ways,
                    "layernorm_eps": self.layernorm_eps,
                    "xpos_rel_pos": self.xpos_scale_base is not None,
                    "xpos_scale_base": self.xpos_scale_base or 512,
                },
                self.embed_dim, self.num_heads, self.dropout, self.self_attention,
                self.encoder_decoder_attention, self.subln,
                num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
                kdim=self.kdim, vdim=self.vdim, scale=self.scale, qk_norm=self.qk_norm,
                position=None if rotary is None else RotaryEmbedding(
                    self.head_dim, base=rotary.base, interleaved=rotary.interleaved,
                    rotary_dim=rotary.rotary_dim, scaling=rotary.scaling,
                ),
                window=self.window, device="meta",
                add_bias_kv=self.add_bias_kv, add_zero_attn=self.add_zero_attn,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ConversionError(str(error)) from error
        for name in set(PROJECTIONS) - self.biases:
            for projection in _ways(getattr(attention, name)):
                # One argument of the constructor serves all four projections.
                projection.register_parameter("bias", None)
        return attention

    def peculiarities(self) -> dict[str, str]:
        """What not every attention has, by argument, with the value it has here."""
        found: dict[str, str] = {}
        for name, value, usual in (
            ("num_kv_heads", self.num_kv_heads, self.num_heads),
            ("head_dim", self.head_dim, self.embed_dim // self.num_heads),
            ("kdim", self.kdim, self.embed_dim),
            ("vdim", self.vdim, self.embed_dim),
            ("scale", self.scale, None),
            ("subln", self.subln, False),
            ("xpos_scale_base", self.xpos_scale_base, None),
            ("position", self.rotary, None),
            ("window", self.window, None),
            ("multiway", self.num_ways, 1),
            ("qk_norm", self.qk_norm, None),
            ("add_bias_kv", self.add_bias_kv, False),
            ("add_zero_attn", self.add_zero_attn, False),
        ):
            if value != usual:
                found[name] = f"{name}={value}"
        if self.biases != WITH_BIASES:
            found["bias"] = f"biases of {', '.join(sorted(self.biases)) or 'no projection'}"
        return found


def form_from_state(state: Mapping[str, Tensor], num_heads: int | None, where: str) -> Form:
    """The form that tensors under Zeta's keys have, as far as shapes tell.

    Args:
        state: Of one attention.
        num_heads: Needed unless xPos is there, whose buffer has the width of a head.
        where: What an error calls the state dict.

    Raises:
        ConversionError: Shapes contradict each other, or do not tell how many heads there are.
    """
    ways = len({key for key in state if key.startswith("q_proj.") and key.endswith(".weight")})
    way = ".A" if ways > 1 else ""
    (inner, embed_dim), (inner_kv, kdim), (_, vdim), _ = (
        _matrix(state, f"{name}{way}.weight", where) for name in PROJECTIONS
    )
    if "xpos.scale" in state:
        num_heads = inner // (2 * state["xpos.scale"].numel())
    if num_heads is None:
        raise ConversionError(f"the shapes of {where} do not tell the number of heads")
    if num_heads < 1 or inner % num_heads:
        raise ConversionError(f"{inner} features of {where} cannot be shared by {num_heads} heads")
    head_dim = inner // num_heads
    if inner_kv % head_dim or num_heads % max(inner_kv // head_dim, 1):
        raise ConversionError(
            f"{where} has {inner} features of queries and {inner_kv} of keys, which are not "
            f"{num_heads} heads and equal shares of them"
        )
    return Form(
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=inner_kv // head_dim,
        head_dim=head_dim,
        kdim=kdim,
        vdim=vdim,
        biases=biases_in(state),
        subln=f"inner_attn_ln{way}.weight" in state,
        xpos_scale_base=512.0 if "xpos.scale" in state else None,
        num_ways=ways,
        add_bias_kv="bias_k" in state,
    )


def scale_of(scaling: float, head_dim: int) -> float | None:
    """`Form.scale` of a module whose scores have this factor, in the rounding of its libraries."""
    return None if scaling == head_dim**-0.5 else scaling


def biases_in(state: Mapping[str, Tensor]) -> frozenset[str]:
    """The projections that have a bias among tensors under Zeta's keys."""
    return frozenset(
        name for name in PROJECTIONS if f"{name}.bias" in state or f"{name}.A.bias" in state
    )


def split_position_of(module: nn.Module) -> int:
    """The one ``split_position`` of all multiway modules inside; -1 where there is none.

    Raises:
        ConversionError: They differ, or it is not a number.
    """
    splits: list[object] = [
        part.split_position for part in module.modules() if hasattr(part, "split_position")
    ]
    numbers = {split for split in splits if isinstance(split, int)} or {-1}
    if len(numbers) > 1 or not all(isinstance(split, int) for split in splits):
        raise ConversionError("split_position must be one number for all multiway modules inside")
    return numbers.pop()


def _ways(module: nn.Module | None) -> list[nn.Module]:
    return [] if module is None else ways_of(module)


def _qk_norm(attention: MultiheadAttention) -> QueryKeyNorm | None:
    if isinstance(attention.q_norm, RMSNorm):
        return "rms"
    return "l2" if isinstance(attention.q_norm, UnitNorm) else None


def _matrix(state: Mapping[str, Tensor], key: str, where: str) -> tuple[int, int]:
    if key not in state or state[key].dim() != 2:
        got = tuple(state[key].shape) if key in state else "none"
        raise ConversionError(f"{key} of {where} must be a matrix; got {got}")
    rows, columns = state[key].shape
    return rows, columns
