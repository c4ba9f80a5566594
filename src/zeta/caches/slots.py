"""`Slots`: preallocated keys, values and padding, written in place.

Shapes: B batch, G key heads, N new tokens, C slots, D head dimension.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from zeta.caches.form import Form


class Slots(NamedTuple):
    """Memory for ``C`` tokens of each sequence; zeros where nothing was written yet.

    Attributes:
        form: Of the tokens.
        key: ``(B, G, C, D)``.
        value: ``(B, G, C, Dv)``.
        shown_key, shown_value: The same memory under version counters of their own: writing to
            slots that nobody has seen does not count as changing what was shown.
    """

    form: Form
    key: Tensor
    value: Tensor
    shown_key: Tensor
    shown_value: Tensor

    @classmethod
    def empty(cls, form: Form, num_slots: int) -> "Slots":
        """New memory."""
        if torch.compiler.is_compiling():
            key, value = _zeros(form, num_slots)
            return cls(form, key, value, key, value)
        # Nothing could be written to a tensor of inference mode outside of it.
        with torch.inference_mode(False):
            key, value = _zeros(form, num_slots)
            return cls(form, key, value, key.data, value.data)

    def __reduce__(self) -> tuple[Any, ...]:
        # `pickle` would give what is shown a memory of its own.
        return _filled, (self.form, self.key, self.value)

    @property
    def num_slots(self) -> int:
        """``C``."""
        return self.key.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.key.nbytes + self.value.nbytes

    def write(self, first: int, key: Tensor, value: Tensor) -> None:
        """Put tokens ``(B, G, N, ...)`` into the slots from ``first`` on."""
        self.key.narrow(2, first, key.shape[2]).copy_(key)
        self.value.narrow(2, first, value.shape[2]).copy_(value)

    def scatter(self, at_N: Tensor, key: Tensor, value: Tensor) -> None:
        """Put tokens into the slots ``at_N``, known to the device alone."""
        self.key.index_copy_(2, at_N, key)
        self.value.index_copy_(2, at_N, value)

    def show(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first slots."""
        return self.shown_key.narrow(2, 0, length), self.shown_value.narrow(2, 0, length)

    def changed(self) -> None:
        """Mark everything shown so far as changed."""
        if not torch.compiler.is_compiling():
            increment_version((self.shown_key, self.shown_value))

    def clear_from(self, length: int) -> None:
        """Zero the slots from ``length`` on: not even a NaN that was there may come back."""
        self.key[:, :, length:].zero_()
        self.value[:, :, length:].zero_()
        self.changed()

    def copy(self) -> "Slots":
        """The same contents in new memory."""
        new = Slots.empty(self.form, self.num_slots)
        new.key.copy_(self.key)
        new.value.copy_(self.value)
        return new

    def take(self, index: Tensor) -> "Slots":
        """The sequences ``index``: in the same memory if they are as many, otherwise in new."""
        batch = len(index)
        new = self
        if batch != self.form.batch:
            new = Slots.empty(self.form._replace(batch=batch), self.num_slots)
        new.key.copy_(self.key.index_select(0, index))
        new.value.copy_(self.value.index_select(0, index))
        new.changed()
        return new

    def restore(self, kept: "Slots") -> "Slots":
        """The contents of ``kept``, in this memory if it fits; the caller says `changed`."""
        if kept.form != self.form:
            return kept
        self.key.copy_(kept.key)
        self.value.copy_(kept.value)
        return self

    def to(self, device: torch.device) -> "Slots":
        """The same contents on a device; itself if it is there."""
        if device == self.form.device:
            return self
        new = Slots.empty(self.form._replace(device=device), self.num_slots)
        new.key.copy_(self.key)
        new.value.copy_(self.value)
        return new


def _filled(form: Form, key: Tensor, value: Tensor) -> Slots:
    new = Slots.empty(form, key.shape[2])
    new.key.copy_(key)
    new.value.copy_(value)
    return new


def own(tensor: Tensor) -> Tensor:
    """A copy that can be written to whatever the mode: one of inference mode could only be
    there."""
    if torch.compiler.is_compiling():
        return tensor.clone()
    with torch.inference_mode(False):
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return new.copy_(tensor)


def own_or_none(tensor: Tensor | None) -> Tensor | None:
    """`own`, of a tensor."""
    return None if tensor is None else own(tensor)


def own_on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    """A tensor on a device that can be written to whatever the mode; itself if it is that."""
    if tensor is None or (tensor.device == device and not tensor.is_inference()):
        return tensor
    return own(tensor.to(device))


def _zeros(form: Form, num_slots: int) -> tuple[Tensor, Tensor]:
    shape = form.batch, form.heads, num_slots
    key = torch.zeros(*shape, form.head_dim, dtype=form.dtype, device=form.device)
    return key, torch.zeros(*shape, form.value_dim, dtype=form.dtype, device=form.device)
