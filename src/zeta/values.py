"""What masks and biases share: `Tile`, where a block of scores lies, and `Value`, their base.

Shape suffixes: B batch, H heads, T target length, S source length.
"""

import dataclasses
import functools
import json
import math
import numbers
import operator
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self, TypeGuard, TypeVar

import torch
from torch import Tensor

ALL = slice(None)

# NumPy's are numbers too; those that a compiler does not know are none of Python's.
_INTEGERS = (int, numbers.Integral, torch.SymInt)
_NUMBERS = (float, numbers.Real, torch.SymFloat, *_INTEGERS)

_WITHOUT_TENSORS = (str, type(None), *_NUMBERS)
_OF_PYTHON = (bool, int, float)
# As `dataclasses.fields` tells them from constants of the class; short calls ask for tensors.
_FIELD = dataclasses._FIELD  # type: ignore[attr-defined]  # nothing public is as fast
_CANNOT_HOLD = (
    "a mask or bias cannot hold a {}: its fields are tensors, numbers, masks or biases, and tuples "
    "of these"
)

_SAYING = ("visible", "apply", "values", "at", "reach", "offset_vector")
"""The methods that say what a mask or a bias does to scores."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Where a block of scores lies: its ranges by index, and the positions of its queries and keys.

    Attributes:
        batches, heads, rows, columns: Slices of the whole ``(B, H, T, S)`` scores.
        query_position: int64, broadcastable to ``(B, H, rows, columns)``: ``(1 or B, 1, rows, 1)``.
        key_position: int64, ``(1 or B, 1, 1, columns)``. Negative: an empty slot.
    """

    query_position: Tensor
    key_position: Tensor
    batches: slice = dataclasses.field(default_factory=lambda: ALL)
    heads: slice = dataclasses.field(default_factory=lambda: ALL)
    rows: slice = dataclasses.field(default_factory=lambda: ALL)
    columns: slice = dataclasses.field(default_factory=lambda: ALL)

    @classmethod
    def whole(cls, target: int, source: int, *, device: torch.device | str = "cpu") -> "Tile":
        """All scores of ``target`` queries that end where ``source`` keys end."""
        query_position_T = torch.arange(source - target, source, device=device)
        key_position_S = torch.arange(source, device=device)
        return cls(query_position_T[None, None, :, None], key_position_S[None, None, None, :])

    def cut(self, tensor: Tensor) -> Tensor:
        """The part of a ``(1 or B, 1 or H, 1 or T, 1 or S)`` tensor that lies over this tile."""
        return cut(tensor, (self.batches, self.heads, self.rows, self.columns))


def cut(tensor: Tensor, parts: Sequence[slice]) -> Tensor:
    """A part of each dimension of a tensor, all of those in which it has one entry for all."""
    pairs = zip(tensor.shape, parts, strict=True)
    return tensor[tuple(ALL if size == 1 else part for size, part in pairs)]


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A frozen description of a mask or a bias; equal only to itself.

    `flatten` takes it apart into tensors and a string, so that it can cross the border of a
    ``torch.library`` operator, and `unflatten` puts it together again.
    """

    _kinds: ClassVar = weakref.WeakValueDictionary[str, "type[Value]"]()
    _named: ClassVar[Counter[str]] = Counter()
    _key: ClassVar[str]

    meaning: ClassVar[type["Value"]]
    """The class that says what it does: its own, or the nearest that it leaves all of that to."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
        Value._named[name] += 1
        # Without a number where it can be: programs that were saved hold the key.
        cls._key = name if Value._named[name] == 1 else f"{name} {Value._named[name]}"
        Value._kinds[cls._key] = cls
        base = next(kind for kind in cls.__mro__[1:] if issubclass(kind, Value))
        says = any(getattr(cls, name, None) is not getattr(base, name, None) for name in _SAYING)
        cls.meaning = cls if says or base is Value else base.meaning

    def check(self, batch: int, heads: int, target: int, source: int, device: torch.device) -> None:
        """Raise ValueError if this cannot describe ``(batch, heads, target, source)`` scores."""

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        """Its shape over scores of these sizes: 1 in each dimension over which it is constant."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """The tensors of `flatten`, without the cost of the string."""
        tensors: list[Tensor] = []
        for name, field in self.__dataclass_fields__.items():
            if field._field_type is _FIELD:  # type: ignore[attr-defined]  # see there
                _collect(getattr(self, name), tensors)
        return tensors

    def device(self) -> torch.device:
        """Where its tensors are; the CPU if it has none."""
        tensors = self.tensors()
        return tensors[0].device if tensors else torch.device("cpu")

    def flatten(self) -> tuple[str, list[Tensor]]:
        """A string without tensors, and the tensors it refers to by number."""
        tensors: list[Tensor] = []
        return _describe(self, tensors), tensors

    @classmethod
    def unflatten(cls, spec: str, tensors: Sequence[Tensor]) -> Self:
        """The inverse of `flatten`."""
        value = _build(_parse(spec), tensors)
        if not isinstance(value, cls):
            raise TypeError(f"spec must describe a {cls.__name__}; got {type(value).__name__}")
        return value


ValueT = TypeVar("ValueT", bound=Value)


def means(value: Value | None, *kinds: type[ValueT]) -> TypeGuard[ValueT]:
    """Whether it does what one of these classes does, and a subclass of theirs changes nothing."""
    return isinstance(value, kinds) and value.meaning in kinds


def _collect(item: object, tensors: list[Tensor]) -> None:
    if type(item) in _OF_PYTHON:
        return
    if isinstance(item, Tensor):
        tensors.append(item)
    elif isinstance(item, Value):
        tensors += item.tensors()
    elif isinstance(item, tuple):
        for part in item:
            _collect(part, tensors)
    elif not isinstance(item, _WITHOUT_TENSORS):
        raise TypeError(_CANNOT_HOLD.format(type(item).__name__))


def _describe(item: object, tensors: list[Tensor]) -> str:
    """JSON, written by hand: torch.compile cannot follow the `json` module."""
    if isinstance(item, Tensor):
        tensors.append(item)
        return f'{{"tensor": {len(tensors) - 1}}}'
    if isinstance(item, tuple):
        return f"[{', '.join([_describe(part, tensors) for part in item])}]"
    if isinstance(item, Value):
        fields = [
            f'"{field.name}": {_describe(getattr(item, field.name), tensors)}'
            for field in dataclasses.fields(item)
        ]
        return f'{{"kind": "{item._key}", "fields": {{{", ".join(fields)}}}}}'
    if item is None:
        return "null"
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, _NUMBERS):
        return spelled(item)
    raise TypeError(_CANNOT_HOLD.format(type(item).__name__))


def spelled(number: Any) -> str:
    """A number as text, under torch.compile too, which is then bound to it."""
    # What the compiler has as a symbol takes its value in `index` and in `hex`.
    if isinstance(number, _INTEGERS):
        return repr(operator.index(number))
    text = repr(float.fromhex(float(number).hex()))
    return {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(text, text)


@functools.lru_cache(maxsize=1024)
def _parse(spec: str) -> object:
    return json.loads(spec)


def _build(item: object, tensors: Sequence[Tensor]) -> Any:
    if isinstance(item, list):
        return tuple(_build(part, tensors) for part in item)
    if isinstance(item, dict):
        if "tensor" in item:
            return tensors[item["tensor"]]
        # Not called: what it makes of its fields is made already.
        value = object.__new__(Value._kinds[item["kind"]])
        for name, part in item["fields"].items():
            object.__setattr__(value, name, _build(part, tensors))
        return value
    return item


def check_lengths(name: str, lengths: Tensor, batch: int, device: torch.device) -> None:
    """Raise ValueError unless ``lengths`` holds one integer for each of ``batch`` sequences."""
    if lengths.shape != (batch,):
        raise ValueError(
            f"{name} must have shape ({batch},), one a sequence; got {tuple(lengths.shape)}"
        )
    check_device(name, lengths, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless ``tensor`` is on the device of the query."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the query's device {device}; got {tensor.device}")


def kind(value: object) -> str:
    """What came, for messages."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def not_joined(other: object, words: str) -> Any:
    """What masks and biases answer where something else is joined to them.

    Raises:
        TypeError: It is a tensor, which does not tell what it means; in these words.
    """
    if isinstance(other, Tensor):
        raise TypeError(words)
    return NotImplemented


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor, and not a nested one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {kind(value)}")
    if value.is_nested:
        raise TypeError(
            f"{name} must not be a nested tensor: pad it (to_padded_tensor), and hide the padding"
        )


def check_floating(name: str, tensor: object) -> None:
    """Raise TypeError unless ``tensor`` is a floating-point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {kind(tensor)}")


def check_integers(name: str, tensor: object) -> None:
    """Raise TypeError unless ``tensor`` is an integer tensor."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.is_floating_point()
        or tensor.is_complex()
        or tensor.dtype == torch.bool
    ):
        raise TypeError(f"{name} must be an integer tensor; got {kind(tensor)}")


def signed(tensor: Tensor) -> Tensor:
    """Integers as they are, or as int64 where torch neither compares nor orders their dtype."""
    if tensor.dtype not in (torch.uint16, torch.uint32, torch.uint64):
        return tensor
    found = tensor.to(torch.int64)
    # What is beyond int64 is larger than any position, as is the largest of them.
    return torch.where(found < 0, torch.iinfo(torch.int64).max, found)


def check_integer(name: str, value: int) -> int:
    """An integer, which neither a bool nor a tensor is, as a number of Python's.

    That has room for whatever is made of it; NumPy's narrow ones wrap around. What a compiler does
    not know stays as it is.

    Raises:
        TypeError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{name} must be an integer; got {kind(value)}")
    return value if isinstance(value, int | torch.SymInt) else operator.index(value)


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a number, which neither a bool nor a tensor is."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number; got {kind(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless it is True or False, or 1 or 0: any other text would be true."""
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False; got {value!r:.80}")


def python_number(value: float) -> float:
    """A number as one of Python's; see `check_integer`."""
    return value if isinstance(value, float | int | torch.SymFloat | torch.SymInt) else float(value)


def is_finite(value: float) -> bool:
    """Whether a float can hold it: an integer may be too large.

    Not by `math.isfinite`, which a compiler cannot ask of a number that it does not know.
    """
    if isinstance(value, int):
        return -sys.float_info.max <= value <= sys.float_info.max
    return -math.inf < value < math.inf


def check_probability(name: str, value: float) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is in ``[0, 1)``."""
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1); got {value}")


def check_finite(name: str, value: float) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is a finite one."""
    check_number(name, value)
    if not is_finite(value):
        raise ValueError(f"{name} must be finite; got {value}")


def check_positive(name: str, value: float) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is above 0 and finite."""
    check_number(name, value)
    if not (is_finite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite; got {value}")


def check_size(name: str, size: int) -> int:
    """`check_integer`, and ValueError unless it is positive."""
    size = check_integer(name, size)
    if size < 1:
        raise ValueError(f"{name} must be positive; got {size}")
    return size


def broadcasts(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether each size of ``shape`` is 1 or that of ``sizes``, which are as many."""
    # Not `size in (1, full)`: where torch.compile knows the first as a number and the second as a
    # symbol, it says no without comparing them.
    return all(size == 1 or size == full for size, full in zip(shape, sizes, strict=True))


def check_scores_shape(
    name: str, shape: Sequence[int], batch: int, heads: int, target: int, source: int
) -> None:
    """Raise ValueError unless a four-dimensional ``shape`` broadcasts to the scores."""
    sizes = (batch, heads, target, source)
    if not broadcasts(shape, sizes):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, target, source) = {sizes}; got {tuple(shape)}"
        )


def check_positions_shape(name: str, shape: Sequence[int], batch: int, length: int) -> None:
    """Raise ValueError unless ``shape`` is that of positions of ``length`` tokens."""
    is_batched = len(shape) == 2 and broadcasts(shape[:1], (batch,))
    if shape[-1:] != (length,) or not (is_batched or len(shape) == 1):
        raise ValueError(
            f"{name} must have shape ({length},) or (1 or {batch}, {length}); got {tuple(shape)}"
        )


def broadcast_shape(shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The shape to which four-dimensional ``shapes`` broadcast together."""
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def as_scores(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` with leading dimensions of one added up to four, as broadcasting would."""
    if tensor.dim() > 4:
        raise ValueError(f"{name} must have at most 4 dimensions; got shape {tuple(tensor.shape)}")
    return tensor[(None,) * (4 - tensor.dim())] if tensor.dim() < 4 else tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of this dtype are summed and normalised: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
