"""`check`: a module and its conversion, run side by side.

Shapes: B batch, H heads, T target length, S source length, E embedding.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from zeta.convert.errors import ConversionError
from zeta.convert.examples import Call, calls, make_generator
from zeta.convert.modules import form_of, state_of
from zeta.convert.registry import recognise
from zeta.convert.report import Case, Report
from zeta.convert.source import Runner, Source
from zeta.convert.t5 import BIAS, has_bias
from zeta.convert.tables import Table, to_zeta
from zeta.nn import MultiheadAttention, RelativePositionBias, set_split_position

_ALWAYS = {"dropout": "the two draw from different generators; both are run without it"}


def check(
    module: nn.Module,
    attention: MultiheadAttention,
    *,
    rel_pos: RelativePositionBias | None = None,
    batch: int = 2,
    length: int = 12,
    seed: int = 0,
    tolerance: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Report:
    """Run a module and its conversion on random inputs, and compare all that comes out.

    Compared are outputs, attention weights, and the gradients of inputs and of parameters, for
    random inputs, causal, random and additive masks, padding, keys of another length, splits of
    multiway, and decoding token by token, with ``encoder_decoder_attention`` over an encoder's
    keys, as far as the module has them. Besides, the parameters are compared bit for bit. Both run
    as copies on the CPU, without dropout.

    Args:
        module: What was converted, or what `to_module` made.
        attention: Zeta's.
        rel_pos: The position bias that goes with a T5 attention that has one.
        batch: Sequences of the inputs.
        length: Tokens of the inputs.
        seed: Of the inputs.
        tolerance: The largest relative error that passes: see `Case`. By default 1e-10 in float64,
            or 1e-5 where the module takes its softmax or its rotations in float32; 1e-4 in float32.
        dtype: In which both are run: float64 or float32.

    Returns:
        The report; `Report.passed` is the verdict.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size is not positive, or the dtype another.
        ConversionError: The module is of no known kind, two of its projections share a parameter,
            or ``rel_pos`` is missing or not wanted.
    """
    _check_arguments(attention, rel_pos, batch, length, dtype)
    source = recognise(module)
    for part in (module, attention):
        if any(parameter.is_meta for parameter in part.parameters()):
            raise ConversionError("a module on the meta device has no numbers to compare")
        _check_nothing_shared(part)
    if has_bias(module) != (rel_pos is not None):
        verb = "needs" if has_bias(module) else "takes no"
        raise ConversionError(
            f"this {source.title} {verb} rel_pos, its zeta.convert.relative_position_bias"
        )
    form = form_of(module, source)
    state, table = state_of(module, source)
    changed, compared = _differences(to_zeta(state, table, source.title), attention)
    if rel_pos is not None:
        compared += 1
        weight = rel_pos.relative_attention_bias.weight
        if not _same(dict(module.state_dict())[BIAS], weight):
            changed.append("rel_pos." + BIAS)
        length = max(length, min(rel_pos.max_distance + 2, 256))
    if tolerance is None:
        tolerance = source.tolerance if dtype == torch.float64 else 1e-4
    pair = _Pair(source, module, attention, rel_pos, table, dtype)
    cases = []
    for call in calls(form, pair.runner, batch, length, dtype, make_generator(seed)):
        cases.append(pair.compare(call))
    not_compared = {**_ALWAYS, **source.not_compared, **pair.runner.not_compared}
    generator = make_generator(seed)
    x = torch.randn(batch, length, form.embed_dim, generator=generator, dtype=dtype)
    if attention.encoder_decoder_attention and pair.runner.decode_cross is not None:
        memory = torch.randn(batch, length + 3, form.kdim, generator=generator, dtype=dtype)
        cases.append(pair.compare_decoding_cross(x, memory))
    elif not attention.encoder_decoder_attention and pair.runner.decode is not None:
        cases.append(pair.compare_decoding(x))
    else:
        not_compared.setdefault("decoding", f"this {source.title} is not for it")
    if form.window is not None and form.window >= length:
        not_compared["window"] = f"it is {form.window} tokens wide, the inputs {length} long"
    return Report(
        source.title, tuple(cases), tuple(changed), compared, not_compared, tolerance, dtype
    )


class _Pair:
    """Copies of the two, ready to be run."""

    def __init__(
        self,
        source: Source,
        module: nn.Module,
        attention: MultiheadAttention,
        rel_pos: RelativePositionBias | None,
        table: Table,
        dtype: torch.dtype,
    ) -> None:
        self.module, self.attention, self.rel_pos = (
            _prepared(part, dtype) for part in (module, attention, rel_pos)
        )
        self.runner: Runner = source.runner(self.module)
        self.source, self.table = source, table

    def compare(self, call: Call) -> Case:
        """One call of each, forward and backward."""
        for part in (self.module, self.attention):
            part.apply(set_split_position(call.split))
        theirs, their_inputs = call.fresh()
        ours, our_inputs = call.fresh()
        expected, expected_weights = self.runner.call(theirs)
        rel_pos = self.rel_pos if ours.rel_pos is None else ours.rel_pos
        found, weights = self.attention(
            ours.query, ours.key, ours.value, key_padding_mask=ours.padding,
            attn_mask=ours.added if call.is_causal else _mask(ours.hidden, ours.added),
            rel_pos=rel_pos, is_causal=call.is_causal, need_weights=True,
        )  # fmt: skip
        cotangent = call.cotangent(expected)
        if expected_weights is not None and expected_weights.dim() == 3:
            weights = weights.mean(0)
        expected_inputs, expected_parameters = self._theirs(
            expected.backward, cotangent, their_inputs
        )
        found_inputs, found_parameters = self._ours(found.backward, cotangent, our_inputs)
        return Case(
            call.name,
            _error([found], [expected]),
            None if expected_weights is None else _error([weights], [expected_weights]),
            _error(found_inputs, expected_inputs),
            _error(found_parameters, expected_parameters),
        )

    def _theirs(
        self, backward: Any, cotangent: Tensor, inputs: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of inputs, and of parameters in the order of Zeta's keys."""
        self.module.zero_grad()
        backward(cotangent)
        gradients = {
            name: _gradient(parameter) for name, parameter in self.module.named_parameters()
        }
        known = {entry.source for entry in self.table}
        own = to_zeta(
            {name: gradient for name, gradient in gradients.items() if name in known},
            tuple(entry for entry in self.table if entry.source in gradients),
        )
        ordered = [own[name] for name in sorted(own)]
        if self.rel_pos is not None:
            ordered.append(gradients[BIAS])
        return [_gradient(tensor) for tensor in inputs], ordered

    def _ours(
        self, backward: Any, cotangent: Tensor, inputs: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        self.attention.zero_grad()
        if self.rel_pos is not None:
            self.rel_pos.zero_grad()
        backward(cotangent)
        own = dict(self.attention.named_parameters())
        ordered = [_gradient(own[name]) for name in sorted(own)]
        if self.rel_pos is not None:
            ordered += [_gradient(parameter) for parameter in self.rel_pos.parameters()]
        return [_gradient(tensor) for tensor in inputs], ordered

    def compare_decoding(self, x: Tensor) -> Case:
        """Token by token, each with its cache."""
        for part in (self.module, self.attention):
            part.apply(set_split_position(-1))
        assert self.runner.decode is not None
        with torch.no_grad():
            expected = self.runner.decode(x)
            state: dict[str, Any] = {}
            steps = [
                self.attention(token, token, token, state, rel_pos=self.rel_pos, is_causal=True)[0]
                for token in x.split(1, dim=1)
            ]
        return Case("decoding token by token", _error([torch.cat(steps, dim=1)], [expected]))

    def compare_decoding_cross(self, x: Tensor, memory: Tensor) -> Case:
        """Token by token over an encoder's keys, which each projects once."""
        assert self.runner.decode_cross is not None
        with torch.no_grad():
            expected = self.runner.decode_cross(x, memory)
            state: dict[str, Any] = {}
            first, *others = x.split(1, dim=1)
            steps = [self.attention(first, memory, memory, state)[0]]
            steps += [self.attention(token, None, None, state)[0] for token in others]
        return Case("decoding, cross", _error([torch.cat(steps, dim=1)], [expected]))


def _check_arguments(
    attention: object, rel_pos: object, batch: int, length: int, dtype: torch.dtype
) -> None:
    if not isinstance(attention, MultiheadAttention):
        raise TypeError(
            f"attention must be a zeta.nn.MultiheadAttention; got {type(attention).__name__}"
        )
    if rel_pos is not None and not isinstance(rel_pos, RelativePositionBias):
        raise TypeError(f"rel_pos must be a RelativePositionBias; got {type(rel_pos).__name__}")
    if batch < 1 or length < 2:
        raise ValueError(f"batch must be at least 1 and length at least 2; got {batch}, {length}")
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype must be torch.float64 or torch.float32; got {dtype}")


def _check_nothing_shared(part: nn.Module) -> None:
    """Raise ConversionError for a parameter of two names: its gradient would be that of both."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in part.named_parameters(remove_duplicate=False):
        other = first.setdefault(parameter, name)
        if other != name:
            raise ConversionError(
                f"{other} and {name} are one parameter, whose gradient is not that of either; "
                "compare a copy in which each has its own"
            )


def _prepared(part: Any, dtype: torch.dtype) -> Any:
    """A copy on the CPU, in ``dtype``, in evaluation, whose every parameter gets a gradient."""
    if part is None:
        return None
    copied = copy.deepcopy(part).to(device="cpu", dtype=dtype).eval()
    copied.requires_grad_(True)
    return copied


def _differences(
    expected: dict[str, Tensor], attention: MultiheadAttention
) -> tuple[list[str], int]:
    """Names of tensors that are not the same in both, and how many there are in all."""
    found = attention.state_dict()
    names = sorted(set(expected) | set(found))
    return [
        name
        for name in names
        if name not in found or name not in expected or not _same(expected[name], found[name])
    ], len(names)


def _same(first: Tensor, second: Tensor) -> bool:
    one, other = first.detach().cpu(), second.detach().cpu()
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool(((one == other) | (one.isnan() & other.isnan())).all())
    )


def _mask(hidden: Tensor | None, added: Tensor | None) -> Tensor | None:
    if added is None or hidden is None:
        return hidden if added is None else added
    return added.masked_fill(hidden, float("-inf"))


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest expected value of all."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return float("inf")
    pairs = list(zip(found, expected, strict=True))
    largest = max((other.abs().max().item() for _, other in pairs), default=0.0)
    differences = [(one - other).abs().max() for one, other in pairs]
    worst = torch.stack(differences).max().item() if differences else 0.0
    if worst == 0.0:
        return 0.0
    return worst / largest if largest else float("inf")


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
