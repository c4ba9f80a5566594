"""What the conversion knows of a source, and how a proof runs it.

Shapes: B batch, H heads, T target length, S source length, E embedding.
"""

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from zeta.convert.errors import ConversionError
from zeta.convert.forms import WITH_BIASES, WITHOUT_BIASES, Form
from zeta.convert.tables import Table


@dataclass(frozen=True)
class Example:
    """Inputs of one call, batch first.

    Attributes:
        query: ``(B, T, E)``.
        key: ``(B, S, kdim)``; the query itself in self-attention.
        value: ``(B, S, vdim)``; the query itself in self-attention.
        hidden: ``(T, S)`` bool, True hides; None hides nothing.
        added: ``(T, S)``, added to the scores.
        padding: ``(B, S)`` bool, True hides.
        rel_pos: ``(B * H, T, S)``, added to the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor | None = None
    added: Tensor | None = None
    padding: Tensor | None = None
    rel_pos: Tensor | None = None

    def additive(self, *, with_padding: bool) -> Tensor | None:
        """All masks as one tensor to be added: ``(B, 1, T, S)``, or ``(T, S)`` without padding."""
        parts = []
        if self.added is not None:
            parts.append(self.added)
        if self.hidden is not None:
            parts.append(_as_added(self.hidden, self.query))
        if with_padding and self.padding is not None:
            parts.append(_as_added(self.padding, self.query)[:, None, None])
        if not parts:
            return None
        total = torch.stack(torch.broadcast_tensors(*parts)).sum(0)
        if not with_padding:
            return total
        batch, target, source = self.query.shape[0], self.query.shape[1], self.key.shape[1]
        return total.expand(batch, 1, target, source)


@dataclass(frozen=True)
class Runner:
    """How a proof runs a source's module.

    Attributes:
        call: From an example to the output ``(B, T, E)`` and the weights ``(H, B, T, S)`` or None.
        decode: From ``(B, T, E)`` to the outputs of causal attention, taken one token at a time
            with the source's own cache; None: it has none.
        decode_cross: From ``(B, T, E)`` and an encoder's ``(B, S, kdim)`` to the outputs of
            attention to these, likewise.
        separate_values: Values can be another tensor than keys.
        rel_pos: It takes ``rel_pos`` of an example.
        not_compared: What cannot be compared with this module, and why.
    """

    call: Callable[[Example], tuple[Tensor, Tensor | None]]
    decode: Callable[[Tensor], Tensor] | None = None
    decode_cross: Callable[[Tensor, Tensor], Tensor] | None = None
    separate_values: bool = False
    rel_pos: bool = False
    not_compared: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """One kind of attention of another library.

    Attributes:
        kind: Its name in calls and commands.
        title: Its name in reports.
        classes: Qualified names of its classes.
        tables: Key tables of its layouts, that of new modules first.
        read: From a module of these classes to its form, biases apart.
        settle: From the form that shapes tell, and the source's keys, to the whole one.
        build: From a form to a new module; `refusals` is empty.
        runner: From a module that may be written to, to how a proof runs it.
        expresses: Arguments, as `Form.peculiarities` names them, that it can have.
        biases: Which projections may have biases, in each way that it can be.
        scale: Of the scores, where it is not ``1 / sqrt(head_dim)``.
        tolerance: The largest relative error in float64; more than its rounding where the source
            takes softmax or rotations in float32.
        apart: Keys beside the attention's in the same module, which conversion leaves alone.
        dropped: Keys that older versions have, of tensors that are no parameters.
        not_compared: What a proof cannot compare, and why.
        stand_in: Computes the same function, where this kind's package is not installed.
    """

    kind: str
    title: str
    classes: frozenset[str]
    tables: tuple[Table, ...]
    read: Callable[[nn.Module], Form]
    settle: Callable[[Form, Collection[str]], Form]
    build: Callable[[Form], nn.Module]
    runner: Callable[[nn.Module], Runner]
    expresses: frozenset[str] = frozenset()
    biases: tuple[frozenset[str], ...] = (WITH_BIASES, WITHOUT_BIASES)
    scale: float | None = None
    tolerance: float = 1e-10
    apart: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    not_compared: Mapping[str, str] = field(default_factory=dict)
    stand_in: "Source | None" = None

    def table(self, keys: Collection[str]) -> Table:
        """The table that fits ``keys`` best."""
        return max(self.tables, key=lambda table: sum(entry.source in keys for entry in table))

    def own(self, keys: Collection[str]) -> list[str]:
        """The ``keys`` that conversion takes, known ones and unknown ones."""
        return [key for key in keys if key not in self.apart | self.dropped]

    def refusals(self, form: Form) -> list[str]:
        """What of a form this kind cannot express; empty: it can all."""
        found = form.peculiarities()
        if form.biases in self.biases:
            found.pop("bias", None)
        else:
            found.setdefault("bias", "biases of all projections")
        if form.scale == self.scale:
            found.pop("scale", None)
        elif form.scale is None:
            found["scale"] = "scale=1/sqrt(head_dim)"
        return [text for name, text in found.items() if name not in self.expresses]


def optional(name: str, install: str) -> ModuleType:
    """A module of an optional package.

    Args:
        name: Of the module.
        install: What pip is told to install it.

    Raises:
        ConversionError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ConversionError(f"this needs {package}: pip install {install}") from error


def qualified_name(kind: type) -> str:
    """Where a class was defined, and its name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _as_added(hidden: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, float("-inf"))
