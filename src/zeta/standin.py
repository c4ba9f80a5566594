"""`StandIn`: a tensor that is everything but its numbers, which come when one of them is read."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

PLAIN = (Tensor, Parameter)
"""Classes of tensors whose numbers lie where torch says; a subclass may hold them elsewhere."""

_CHANGE_SHAPE = {
    torch.ops.aten.resize_.default,
    torch.ops.aten.resize_as_.default,
    torch.ops.aten.set_.source_Tensor,
    torch.ops.aten.set_.source_Storage,
    torch.ops.aten.set_.source_Storage_storage_offset,
}


# A dict, not functools.cache, which torch.compile refuses to trace without a warning.
_known_effects: dict[Any, tuple[bool, bool]] = {}


def _effects(operator: Any) -> tuple[bool, bool]:
    """Whether it writes to an argument, and whether it changes the shape of one."""
    known = _known_effects.get(operator)
    if known is None:
        changes_shape = torch.Tag.inplace_view in operator.tags or operator in _CHANGE_SHAPE
        known = _known_effects[operator] = operator._schema.is_mutable, changes_shape
    return known


class StandIn(Tensor):
    """Base of tensors whose shape, strides, dtype and device are known before their numbers.

    An operation that reads numbers gets the tensor that `_value` returns, and returns plain
    tensors. One that writes into it writes into that same tensor.
    """

    # Results are plain tensors, and Python operations on it cost no detour.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch asks

    # Consumers that take it from the type would find no memory; `__dlpack__` serves them.
    __dlpack_c_exchange_api__ = None

    def _value(self) -> Tensor:
        """The numbers: always the same tensor, without a gradient, of the announced strides."""
        raise NotImplementedError

    @classmethod
    def announce(
        cls, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Any:
        """A new tensor of this class, to which its own attributes are then given."""
        self = Tensor._make_wrapper_subclass(
            cls, sizes, strides=strides, dtype=dtype, device=device
        )
        # Code that goes past the dispatcher to the memory raises, where it would crash.
        torch._C._set_throw_on_mutable_data_ptr(self)
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its own default, a function
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        writes, changes_shape = _effects(func)
        if changes_shape:
            raise RuntimeError(
                f"{cls.__name__} cannot change its shape in place ({func}); "
                "its clone() is a plain tensor"
            )
        owners: dict[int, StandIn] = {}

        def value_of(tensor: StandIn) -> Tensor:
            value = tensor._value()
            owners[id(value)] = tensor
            return value

        def resolved(item: Any) -> Any:
            if isinstance(item, StandIn):
                return value_of(item)
            if isinstance(item, list | tuple):
                return tree_map_only(StandIn, value_of, item)
            return item

        result = func(
            *[resolved(item) for item in args],
            **{name: resolved(item) for name, item in (kwargs or {}).items()},
        )
        if not writes:
            return result
        # An operation returns what it wrote to: that is the tensor it was given, not its value.
        return tree_map_only(Tensor, lambda tensor: owners.get(id(tensor), tensor), result)

    def _plain(self) -> Tensor:
        """A leaf in the same memory."""
        return self._value().detach().requires_grad_(self.requires_grad)

    # What torch answers from the memory of a tensor, past the dispatcher.

    @property
    def data(self) -> Tensor:
        return self._value().detach()

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        raise RuntimeError(f"the data of {type(self).__name__} cannot be replaced; use copy_()")

    def numpy(self, *, force: bool = False) -> Any:
        return self._plain().numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain().__array__(*args, **kwargs)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._plain().__dlpack__(**kwargs)

    def tolist(self) -> Any:
        return self._plain().tolist()

    def data_ptr(self) -> int:
        return self._plain().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._plain().untyped_storage()

    def apply_(self, callable: Callable[[Any], Any]) -> Tensor:
        self._plain().apply_(callable)
        return self

    def map_(self, tensor: Tensor, callable: Callable[[Any, Any], Any]) -> Tensor:
        self._plain().map_(tensor, callable)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            # Refused, as for every tensor that has a history.
            return Tensor.__deepcopy__(self, memo)  # type: ignore[no-any-return, no-untyped-call]
        plain = self._plain()
        plain.grad = self.grad
        return copy.deepcopy(plain, memo)

    def __reduce_ex__(self, proto: Any) -> Any:
        return self._plain().__reduce_ex__(proto)
