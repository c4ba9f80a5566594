"""`MaskStandIn`: what a model passes round as its attention mask."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zeta.masks import Mask
from zeta.standin import StandIn


@dataclasses.dataclass(frozen=True, slots=True)
class Pattern:
    """Which keys the queries see.

    Attributes:
        mask: The value, or None: all.
        keys: The first so many keys count, the others are empty slots of a static cache; None, all.
            The queries are the last of them.
    """

    mask: Mask | None
    keys: int | None = None


_SUMS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}


class MaskStandIn(StandIn):
    """A bool mask ``(B, 1, T, S)``, True: seen, of which there is only its `Pattern`.

    Models only hand it on. One that computes with it gets the dense tensor, made on first use, and
    may write to it: from then on its numbers count. But one that adds it to floating-point numbers
    takes it for another kind of mask.
    """

    pattern: Pattern
    _dense: Callable[[], Tensor]
    _made: Tensor | None

    @classmethod
    def of(
        cls,
        pattern: Pattern,
        sizes: tuple[int, int, int, int],
        device: torch.device,
        dense: Callable[[], Tensor],
    ) -> "MaskStandIn":
        """Stand for the mask that ``dense`` would make."""
        _, _, target, source = sizes
        strides = (target * source, target * source, source, 1)
        self: MaskStandIn = cls.announce(sizes, strides, torch.bool, device)
        self.pattern, self._dense, self._made = pattern, dense, None
        return self

    @property
    def is_made(self) -> bool:
        """Whether there are numbers, which need no longer be those of the pattern."""
        return self._made is not None

    def _value(self) -> Tensor:
        if self._made is None:
            self._made = self._dense().contiguous()
        return self._made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its own default, a function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            # Reentrant activation checkpointing detaches every argument.
            source: MaskStandIn = args[0]
            sizes: Any = tuple(source.shape)
            detached = cls.of(source.pattern, sizes, source.device, source._value)
            detached._made = source._made
            return detached
        if func in _SUMS and any(map(_adds_up_wrong, (args[1], args[0]), args)):
            raise ValueError(
                "attn_implementation='zeta' cannot run this model: it adds its mask to scores that "
                "it has computed itself; use attn_implementation='eager'"
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


def _adds_up_wrong(scores: object, mask: object) -> bool:
    """Whether a sum would be larger by 1 where it should be what it was, and not -inf elsewhere.

    A mask that hides nothing makes all scores larger alike, which a softmax does not see.
    """
    return (
        isinstance(mask, MaskStandIn)
        and not (mask.pattern.mask is None and mask.pattern.keys is None)
        and isinstance(scores, Tensor)
        and scores.is_floating_point()
    )
