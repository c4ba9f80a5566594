"""State dicts of whole models: every attention in one, found by its keys and converted."""

import bisect
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeta.convert.checking import check
from zeta.convert.errors import ConversionError
from zeta.convert.forms import PROJECTIONS, Form, biases_in, form_from_state
from zeta.convert.modules import fill, load
from zeta.convert.registry import SOURCES, source_of
from zeta.convert.report import Report
from zeta.convert.source import Source
from zeta.convert.tables import StateDict, Table, from_zeta, to_zeta
from zeta.convert.torch_nn import EXTRA_KEY

ZETA = "zeta"
KINDS = (ZETA, *SOURCES)
# Zeta's own keys are TorchScale's, and those of a learned extra key.
_OWN = dataclasses.replace(
    SOURCES["torchscale"],
    tables=tuple((*table, *EXTRA_KEY) for table in SOURCES["torchscale"].tables),
)


@dataclass(frozen=True)
class Found:
    """One attention of a state dict.

    Attributes:
        prefix: What its keys begin with, dot included; empty where the state dict is its own.
        before: Its tensors, under their keys without the prefix.
        zeta: The same under Zeta's keys.
        after: The same under the target's keys.
    """

    prefix: str
    before: StateDict
    zeta: StateDict
    after: StateDict

    @property
    def name(self) -> str:
        """The prefix, for people."""
        return _spoken(self.prefix)


@dataclass(frozen=True)
class Converted:
    """A state dict whose attentions have been converted.

    Attributes:
        state: All of it; what is no attention's is the same object as before.
        attentions: In the order of their keys.
        dropped: Keys that are gone, of tensors that were no parameters.
        others: Prefixes of what looks like an attention of another kind, left as it is.
    """

    state: dict[str, Any]
    attentions: tuple[Found, ...]
    dropped: tuple[str, ...]
    others: tuple[str, ...]


def convert_state_dict(state: Mapping[str, Any], source: str, target: str = ZETA) -> Converted:
    """Convert every attention in a state dict, by its keys alone.

    Args:
        state: Of a model or of a single attention; it stays as it is.
        source: Whose attentions they are: ``"zeta"`` or a kind that `to_module` knows, or
            ``"zetascale"``.
        target: Whose they shall be.

    Returns:
        The converted state dict, which shares what it left alone, and what was converted.

    Raises:
        TypeError: ``state`` is no mapping of names.
        ValueError: There is no such kind, or both are the same.
        ConversionError: There is no attention of this kind; one lacks keys, has unknown ones, or
            shapes that this kind or the target cannot have; or the two kinds compute different
            scores from the same tensors.
    """
    for kind in (source, target):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise TypeError(f"state must be a mapping of names to tensors; got {type(state).__name__}")
    if source == target:
        raise ValueError(f"source and target are both {source!r}")
    if ZETA not in (source, target):
        _check_scores(source_of(source), source_of(target))
    theirs, ours = _kind(source), _kind(target)
    prefixes, others = _prefixes(state, theirs, source)
    apart = theirs.apart | ours.apart
    found: list[Found] = []
    dropped: list[str] = []
    new_keys: dict[str, list[tuple[str, Tensor]]] = {}
    below = _below(state)
    for prefix in prefixes:
        keys = below(prefix)
        gone = [key for key in keys if key in theirs.dropped]
        own = {key: _tensor(state, prefix + key) for key in keys if key not in {*gone, *apart}}
        name = _spoken(prefix)
        zeta = to_zeta(own, theirs.table(list(own)), name)
        for kind in (source, target):
            _check_shapes(zeta, kind, name)
        _check_biases(zeta, target, name)
        _check_extra_key(zeta, name)
        attention = Found(prefix, own, zeta, _to_target(zeta, ours, name))
        found.append(attention)
        dropped += [prefix + key for key in gone]
        first = next(iter(own))
        new_keys.update({prefix + key: [] for key in (*own, *gone)})
        new_keys[prefix + first] = [(prefix + key, part) for key, part in attention.after.items()]
    converted: dict[str, Any] = {}
    for key, value in state.items():
        for new, part in new_keys.get(key, [(key, value)]):
            if new in converted:
                raise ConversionError(f"{new} would be there twice")
            converted[new] = part
    return Converted(converted, tuple(found), tuple(dropped), tuple(others))


def prove(
    zeta: StateDict, theirs: StateDict, kind: str, num_heads: int | None, name: str
) -> Report:
    """Build two attentions from the shapes of their tensors, and compare them by `check`.

    Args:
        zeta: Tensors under Zeta's keys.
        theirs: The same under the keys of another kind.
        kind: That kind.
        num_heads: None where shapes tell, as xPos's do. What no tensor tells and both share is
            taken to be usual: a dropout of 0, rotations of base 10,000, no window, no key of zeros.
        name: What an error calls the attention.

    Raises:
        ValueError: There is no such kind.
        ConversionError: The number of heads is missing or does not fit, or the kind's package is
            not installed and nothing can stand in.
    """
    source = source_of(kind)
    form = source.settle(form_from_state(zeta, num_heads, name), list(theirs))
    attention = form.build()
    fill(attention, {key: tensor.clone() for key, tensor in zeta.items()})
    with torch.random.fork_rng(devices=[]):
        runs, module = _build(source, form)
    not_compared: dict[str, str] = {}
    if runs is not source:
        not_compared[f"{source.kind} itself"] = (
            f"{runs.title} computes the same, and ran in its place"
        )
    keys = list(module.state_dict())
    if not set(theirs) <= set(keys):
        # Files may have other names than modules of the same kind.
        own = to_zeta(theirs, source.table(list(theirs)), name)
        theirs = from_zeta(own, runs.table(keys), name)
        not_compared["names of tensors"] = (
            f"{runs.title} has others; how they were renamed is not proven"
        )
    load(module, {key: tensor.clone() for key, tensor in theirs.items()}, runs)
    report = check(module, attention)
    not_compared = {**report.not_compared, **not_compared}
    return dataclasses.replace(report, source=source.title, not_compared=not_compared)


def _build(source: Source, form: Form) -> tuple[Source, nn.Module]:
    """A new module, and the source that it is of: another one where a package is missing."""
    try:
        return source, source.build(form)
    except ConversionError:
        if source.stand_in is None:
            raise
        return source.stand_in, source.stand_in.build(form)


def _spoken(prefix: str) -> str:
    return prefix.removesuffix(".") or "the state dict"


def _kind(name: str) -> Source:
    return _OWN if name == ZETA else source_of(name)


def _prefixes(state: Mapping[str, Any], source: Source, kind: str) -> tuple[list[str], list[str]]:
    """Where attentions of a kind are, and where those of other kinds are that look similar.

    Args:
        state: Of a model.
        source: Where the kind's tensors are.
        kind: What the caller calls it.
    """
    complete = _complete(state, source)
    partial = [prefix for prefix in _anchored(state, source.tables) if prefix not in complete]
    others = []
    elsewhere = {p for other in SOURCES.values() for p in _complete(state, other) if partial}
    for prefix in partial:
        if prefix in elsewhere:
            others.append(prefix)
            continue
        own = _below(state)(prefix)
        lacking = [key for key in _required(source.table(own)) if key not in own]
        raise ConversionError(
            f"{_spoken(prefix)} lacks {', '.join(lacking)}; is this one of several files?"
        )
    if not complete:
        anchors = " or ".join(_required(table)[0] for table in source.tables)
        similar = f"; {others[0]} is of another kind" if others else ""
        raise ConversionError(
            f"there is no attention of kind {kind}: no keys that end in {anchors}{similar}"
        )
    return complete, others


def _below(state: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """Finds the keys under a prefix, without it, in the state dict's order; not by reading all."""
    numbers = {key: number for number, key in enumerate(state)}
    ordered = sorted(numbers)

    def find(prefix: str) -> list[str]:
        first, end = (bisect.bisect_left(ordered, prefix + last) for last in ("", chr(0x10FFFF)))
        found = sorted(ordered[first:end], key=numbers.__getitem__)
        return [key.removeprefix(prefix) for key in found]

    return find


def _complete(state: Mapping[str, Any], source: Source) -> list[str]:
    return [
        prefix
        for prefix in _anchored(state, source.tables)
        if any(all(prefix + key in state for key in _required(table)) for table in source.tables)
    ]


def _anchored(state: Mapping[str, Any], tables: tuple[Table, ...]) -> list[str]:
    """The prefixes under which the first key of a table stands, in the state dict's order."""
    anchors = [_required(table)[0] for table in tables]
    prefixes: dict[str, None] = {}
    for key in state:
        for anchor in anchors:
            if key == anchor or key.endswith("." + anchor):
                prefixes[key.removesuffix(anchor)] = None
    return list(prefixes)


def _required(table: Table) -> list[str]:
    return [entry.source for entry in table if not entry.optional]


def _tensor(state: Mapping[str, Any], key: str) -> Tensor:
    value = state[key]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ConversionError(f"{key} must be a tensor of real numbers; got {kind}")
    if value.layout != torch.strided:
        raise ConversionError(f"{key} must be a dense tensor; got {value.layout}")
    return value


def _to_target(zeta: StateDict, target: Source, name: str) -> StateDict:
    """Under the keys of the first of the target's layouts that has a place for all."""
    problems = []
    for table in target.tables:
        try:
            return from_zeta(zeta, table, name)
        except ConversionError as error:
            problems.append(error)
    raise ConversionError(f"no place in {target.title}: {problems[0]}")


def _check_scores(source: Source, target: Source) -> None:
    """Raise ConversionError for kinds whose scores differ in what no tensor tells."""
    one, other = (kind.settle(Form.plain(1, 1), ()) for kind in (source, target))
    reasons = []
    if one.scale != other.scale:
        reasons.append("the factor of the scores")
    if one.rotary != other.rotary:
        reasons.append("the rotation of queries and keys")
    if reasons:
        raise ConversionError(
            f"{source.title} and {target.title} differ in what no tensor tells: "
            f"{' and '.join(reasons)}"
        )


def _check_biases(zeta: StateDict, kind: str, name: str) -> None:
    """Raise ConversionError for biases that a kind's projections do not have, or lack."""
    found = biases_in(zeta)
    if kind != ZETA and found not in source_of(kind).biases:
        listed = ", ".join(sorted(found)) or "no projection"
        raise ConversionError(
            f"{name} has biases of {listed}, as {source_of(kind).title} cannot have"
        )


def _check_extra_key(zeta: StateDict, name: str) -> None:
    """Raise ConversionError for half of a learned extra key and value, or one of a wrong shape."""
    found = {
        entry.source: tuple(zeta[entry.source].shape) for entry in EXTRA_KEY if entry.source in zeta
    }
    key = "k_proj.weight" if "k_proj.weight" in zeta else "k_proj.A.weight"
    shape = (1, 1, zeta[key].shape[0])
    if found and found != {entry.source: shape for entry in EXTRA_KEY}:
        listed = ", ".join(f"{part} {got}" for part, got in found.items())
        raise ConversionError(f"{name} must have bias_k and bias_v of shape {shape}; got {listed}")


def _check_shapes(zeta: StateDict, kind: str, name: str) -> None:
    """Raise ConversionError for shapes that a kind's projections cannot have."""
    way = "" if "q_proj.weight" in zeta else ".A"
    shapes = {}
    for part in PROJECTIONS:
        tensor = zeta[f"{part}{way}.weight"]
        if tensor.dim() != 2:
            raise ConversionError(f"{part} of {name} must be a matrix; got {tuple(tensor.shape)}")
        shapes[part] = tuple(tensor.shape)
    (inner, embed), (inner_k, kdim), (inner_v, vdim), of_output = shapes.values()
    wrong = {
        "out_proj": of_output != (embed, inner),
        "values of other width than keys": inner_k != inner_v,
    }
    title = "zeta.nn.MultiheadAttention"
    if kind != ZETA:
        title, expresses = source_of(kind).title, source_of(kind).expresses
        peculiar = {
            "num_kv_heads": inner_k != inner,
            "head_dim": inner != embed,
            "kdim": kdim != embed,
            "vdim": vdim != embed,
        }
        wrong |= {option: found and option not in expresses for option, found in peculiar.items()}
    reasons = [reason for reason, is_wrong in wrong.items() if is_wrong]
    if reasons:
        listed = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
        raise ConversionError(
            f"{name} has shapes that {title} cannot have ({', '.join(reasons)}): {listed}"
        )
