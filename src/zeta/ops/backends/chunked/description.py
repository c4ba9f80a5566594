"""`Plan`: all of a call but its differentiable tensors, as values, or packed for an operator."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zeta import biases
from zeta.masks import Mask
from zeta.ops.backends.chunked.offsets import Offset, OffsetByPosition
from zeta.ops.backends.chunked.terms import Dense, Distance, Softcap, Term
from zeta.ops.call import AttentionCall
from zeta.ops.offsets import is_by_offset, offset_vector
from zeta.ops.substitution import with_tensors
from zeta.transforms import reasons_of_opaque
from zeta.values import means, spelled

_FAR = 2**40
_LONGEST_VECTOR = 2**24
_OPTIONAL = ("seed", "query_positions", "key_positions")

Word = tuple[str, float]
"""A bias without its tensor: its kind, and the limit of a softcap."""


def unsupported(call: AttentionCall) -> list[str]:
    """The biases that a `Plan` has no word for, and the transforms that cannot pass it."""
    reasons = []
    for bias in biases.summands(call.bias):
        if not (means(bias, biases.Softcap, biases.Dense) or is_by_offset(bias)):
            reasons.append(f"it cannot apply the bias {type(bias).__name__}")
        elif _reach(bias, call) > _LONGEST_VECTOR:
            reasons.append(
                f"with explicit positions, the bias {type(bias).__name__} has no bounded reach"
            )
    return reasons + reasons_of_opaque(call.tensors)


def _reach(bias: biases.Bias, call: AttentionCall) -> int:
    """Of a bias that crosses as a vector; 0 of others."""
    if not is_by_offset(bias) or means(bias, biases.Alibi):
        return 0
    return bias.reach(_longest(call))


def _longest(call: AttentionCall) -> int:
    """The longest distance of a query and a key; a bound where positions are explicit."""
    return _FAR if call.has_positions else max(call.target, call.source) - 1


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What `AttentionCall` says, but for query, key, value and the tensors of biases.

    Attributes:
        words: The biases in order.
        mask, dropout_p, scale, seed, query_positions, key_positions: As in `AttentionCall`.
    """

    words: tuple[Word, ...]
    mask: Mask | None
    dropout_p: float
    scale: float
    seed: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None

    @classmethod
    def of(cls, call: AttentionCall) -> tuple["Plan", list[Tensor]]:
        """The plan of a call, and the tensors of its biases, one for each word but softcaps."""
        words: list[Word] = []
        tensors: list[Tensor] = []
        for bias in biases.summands(call.bias):
            if means(bias, biases.Softcap):
                words.append(("softcap", bias.limit))
            elif means(bias, biases.Dense):
                words.append(("dense", 0))
                tensors.append(bias.tensor)
            elif means(bias, biases.Alibi):
                words.append(("distance", 0))
                tensors.append(bias.slopes)
            elif is_by_offset(bias):
                # The reach is the vector's to tell: a size in a text would bind torch.compile to
                # it.
                words.append(("offset", 0))
                reach = bias.reach(_longest(call))
                tensors.append(offset_vector(bias, reach, call.query.device))
        dropout = call.seed if call.dropout_p else None
        positions = (call.query_positions, call.key_positions)
        return cls(
            tuple(words), call.mask, call.dropout_p, call.scale, dropout, *positions
        ), tensors

    def call(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
        """The call again, without its biases; those are `terms`."""
        return AttentionCall(
            query,
            key,
            value,
            mask=self.mask,
            dropout_p=self.dropout_p,
            scale=self.scale,
            seed=self.seed,
            query_positions=self.query_positions,
            key_positions=self.key_positions,
        )

    def terms(
        self,
        tensors: Sequence[Tensor],
        call: AttentionCall,
        needs_grad: Sequence[bool] | None = None,
    ) -> list[Term]:
        """The biases, in order.

        Args:
            tensors: Of the biases.
            call: Made by `call`.
            needs_grad: Which of the tensors are to gather their gradients; by default none.
        """
        flags = [False] * len(tensors) if needs_grad is None else needs_grad
        rest = iter(zip(tensors, flags, strict=True))
        found: list[Term] = []
        for kind, number in self.words:
            if kind == "softcap":
                found.append(Softcap(number))
                continue
            tensor, needed = next(rest)
            if kind == "dense":
                found.append(Dense(tensor, call, needed))
            elif kind == "distance":
                found.append(Distance(tensor, call, needed))
            else:
                offset = OffsetByPosition if call.has_positions else Offset
                found.append(offset(tensor, tensor.shape[1] // 2, call, needed))
        return found

    def tensors(self) -> list[Tensor]:
        """Those that it holds."""
        own = [getattr(self, name) for name in self._present()]
        return own if self.mask is None else own + self.mask.tensors()

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Plan":
        """The same with others in their place."""
        rest = iter(tensors)
        own: dict[str, Any] = {name: next(rest) for name in self._present()}
        mask = None if self.mask is None else with_tensors(self.mask, rest)
        return dataclasses.replace(self, mask=mask, **own)

    def _present(self) -> list[str]:
        return [name for name in _OPTIONAL if getattr(self, name) is not None]

    def pack(self) -> tuple[list[Tensor], str]:
        """Tensors and a text; the numbers ``scale`` and ``dropout_p`` are left out."""
        words = ",".join(f"{kind}:{spelled(number)}" for kind, number in self.words)
        spec = "" if self.mask is None else self.mask.flatten()[0]
        return self.tensors(), "|".join((words, ",".join(self._present()), spec))

    @classmethod
    def unpack(
        cls, tensors: Sequence[Tensor], spec: str, scale: float, dropout_p: float = 0.0
    ) -> "Plan":
        """The inverse of `pack`."""
        words, present, mask_spec = _parse(spec)
        optional: dict[str, Tensor | None] = dict.fromkeys(_OPTIONAL)
        optional.update(zip(present, tensors, strict=False))
        mask = Mask.unflatten(mask_spec, tensors[len(present) :]) if mask_spec else None
        return cls(words, mask, dropout_p, scale, **optional)


@functools.lru_cache(maxsize=1024)
def _parse(spec: str) -> tuple[tuple[Word, ...], tuple[str, ...], str]:
    words, present, mask_spec = spec.split("|", 2)
    pairs = (word.partition(":") for word in words.split(",") if word)
    return (
        tuple((kind, float(number)) for kind, _, number in pairs),
        tuple(name for name in present.split(",") if name),
        mask_spec,
    )
