"""What a CUDA graph reads of a `StaticCache` beside keys and values: padding and origin, where they
were when it was captured.

Shapes: B batch, C = max_length.
"""

from torch import Tensor

_UNSEEN = (
    "a CUDA graph that was captured over a StaticCache without {} would not see it: "
    "run the step with it, crop the cache to 0 and capture then"
)


def check_allocated(slots: object | None) -> None:
    """Raise ValueError if a captured step would begin with the allocation, at every replay."""
    if slots is None:
        raise ValueError(
            "a StaticCache needs its memory before a CUDA graph is captured over it: "
            "call allocate() first"
        )


def check_seen(
    held_padding: Tensor | None,
    held_origin: Tensor | None,
    padding: Tensor | None,
    origin: Tensor | None,
) -> None:
    """Raise ValueError for new padding or a new origin that a captured step would not see."""
    if padding is not None and (held_padding is None or held_padding.dtype != padding.dtype):
        raise ValueError(_UNSEEN.format(f"a key_padding_mask in {padding.dtype}"))
    if origin is not None and held_origin is None:
        raise ValueError(_UNSEEN.format("positions for xPos"))


def replaced(held: Tensor | None, new: Tensor | None, *, in_place: bool) -> Tensor | None:
    """``new``, or zeros for None; with ``in_place`` in the memory of ``held``, if there is any."""
    if held is None or not in_place:
        return new
    return held.zero_() if new is None else held.copy_(new)
