"""Key tables, and state dicts from one set of keys to another: pure functions.

A table only renames, transposes, cuts and joins. What it does to parameters it therefore also does
to their gradients, and the way back is exact.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from zeta.convert.errors import ConversionError

StateDict: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of a source, and where it goes.

    Attributes:
        source: Its key in the source.
        zeta: Its key in `zeta.nn.MultiheadAttention`; several where the source has equally many
            rows of each one below the other, as in ``in_proj_weight``.
        transposed: The source has inputs as rows.
        optional: A source may lack it.
    """

    source: str
    zeta: tuple[str, ...]
    transposed: bool = False
    optional: bool = False


Table: TypeAlias = tuple[Entry, ...]


def linear(
    source: str,
    *zeta: str,
    transposed: bool = False,
    optional: bool = False,
    ways: tuple[str, ...] = ("",),
) -> Table:
    """Entries of a projection's ``weight``, and of its ``bias``, which may be missing.

    Args:
        source: The projection's name in the source.
        *zeta: Its name in Zeta, or several that the source has packed.
        transposed: The source's weight has inputs as rows.
        optional: The weight may be missing too.
        ways: What follows the name: ``(".A", ".B")`` under multiway.
    """
    entries = []
    for way in ways:
        weights = tuple(f"{name}{way}.weight" for name in zeta)
        biases = tuple(f"{name}{way}.bias" for name in zeta)
        entries.append(Entry(f"{source}{way}.weight", weights, transposed, optional))
        entries.append(Entry(f"{source}{way}.bias", biases, optional=True))
    return tuple(entries)


def to_zeta(state: Mapping[str, Tensor], table: Table, where: str = "the state dict") -> StateDict:
    """A source's tensors under Zeta's keys, all of them new ones.

    Args:
        state: The source's, all of it and nothing else; it stays as it is.
        table: The source's.
        where: What an error calls the state dict.

    Raises:
        ConversionError: A key is missing or unknown, or a shape is wrong.
    """
    check_keys(state, table, where)
    converted: StateDict = {}
    for entry in table:
        if entry.source not in state:
            continue
        tensor = state[entry.source].detach()
        if entry.transposed:
            if tensor.dim() != 2:
                raise ConversionError(
                    f"{entry.source} of {where} must be a matrix; got {tuple(tensor.shape)}"
                )
            tensor = tensor.mT
        rows = tensor.shape[0] if tensor.dim() else 0
        if len(entry.zeta) > 1 and (rows == 0 or rows % len(entry.zeta)):
            raise ConversionError(
                f"{entry.source} of {where} must have rows for {', '.join(entry.zeta)}, equally "
                f"many of each; got {tuple(tensor.shape)}"
            )
        parts = tensor.chunk(len(entry.zeta)) if len(entry.zeta) > 1 else (tensor,)
        for key, part in zip(entry.zeta, parts, strict=True):
            converted[key] = part.clone(memory_format=torch.contiguous_format)
    return converted


def from_zeta(
    state: Mapping[str, Tensor], table: Table, where: str = "the state dict"
) -> StateDict:
    """Zeta's tensors under a source's keys, all of them new ones: `to_zeta` backwards.

    Args:
        state: Zeta's, all of it and nothing else; it stays as it is.
        table: The source's.
        where: What an error calls the state dict.

    Raises:
        ConversionError: A key is missing or unknown, or shapes do not fit together.
    """
    check_keys(state, inverted(table), where)
    converted: StateDict = {}
    for entry in table:
        present = [key for key in entry.zeta if key in state]
        if not present:
            continue
        if len(present) < len(entry.zeta):
            missing = sorted(set(entry.zeta) - set(present))
            raise ConversionError(f"{where} lacks {', '.join(missing)}, for {entry.source}")
        parts = [state[key].detach() for key in entry.zeta]
        if len({part.shape for part in parts}) > 1:
            shapes = ", ".join(f"{key} {tuple(state[key].shape)}" for key in entry.zeta)
            raise ConversionError(f"{entry.source} needs parts of one shape; {where} has {shapes}")
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if entry.transposed:
            tensor = tensor.mT
        converted[entry.source] = tensor.clone(memory_format=torch.contiguous_format)
    return converted


def inverted(table: Table) -> Table:
    """A table of Zeta's keys, to check them with."""
    return tuple(
        Entry(key, (entry.source,), optional=entry.optional)
        for entry in table
        for key in entry.zeta
    )


def check_keys(keys: Iterable[str], table: Table, where: str) -> None:
    """Raise ConversionError unless ``keys`` are those of a table's sources."""
    found = set(keys)
    unknown = sorted(found - {entry.source for entry in table})
    missing = sorted(
        entry.source for entry in table if not entry.optional and entry.source not in found
    )
    if not unknown and not missing:
        return
    problems = []
    if unknown:
        problems.append(f"has unknown {_listed(unknown)}")
    if missing:
        problems.append(f"lacks {_listed(missing)}")
    raise ConversionError(f"{where} {' and '.join(problems)}")


def _listed(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
