"""`from_module` and `to_module`: attentions of other libraries to Zeta's and back."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zeta.convert.errors import ConversionError
from zeta.convert.forms import Form, biases_in
from zeta.convert.registry import recognise, source_of
from zeta.convert.source import Source, qualified_name
from zeta.convert.tables import StateDict, Table, from_zeta, to_zeta
from zeta.nn import MultiheadAttention, set_split_position

_FORWARDS = frozenset({nn.Linear.forward, nn.LayerNorm.forward})
_OTHERS = frozenset(
    {
        "transformers.pytorch_utils.Conv1D",
        "torchscale.component.multiway_network.MultiwayNetwork",
        "torchscale.component.xpos_relative_position.XPOS",
        "zeta.nn.embeddings.multiway_network.MultiwayNetwork",
        "zeta.nn.embeddings.xpos_relative_position.XPOS",
        "apex.normalization.fused_layer_norm.FusedLayerNorm",
    }
)


def from_module(
    module: nn.Module, *, encoder_decoder_attention: bool | None = None
) -> MultiheadAttention:
    """An attention of Zeta's that computes what ``module`` computes.

    It takes batch first, whatever the module takes. Masks are arguments of the call, causal ones
    too; only a sliding window is part of the result, and implies causal. What a model does around
    its attention stays there: position biases (see `relative_position_bias`), dropout of the
    output, residuals, norms. `check` runs both and proves it.

    Args:
        module: One of the classes that the kinds of `to_module` name. It stays as it is.
        encoder_decoder_attention: Whether keys are an encoder's, which a cache keeps as they are.
            Most modules tell; those of torch, T5 and BART do not, and are taken for ones that do
            not.

    Returns:
        With parameters of its own, of the module's devices, dtypes and ``requires_grad``, and its
        training mode. Hooks are not carried over.

    Raises:
        TypeError: ``module`` is no module.
        ConversionError: It is of an unknown class, has an option that cannot be expressed, or
            parameters and submodules other than its class's: quantised or adapted ones.
    """
    source = recognise(module)
    form = form_of(module, source)
    if encoder_decoder_attention is not None:
        if encoder_decoder_attention and form.self_attention:
            raise ConversionError(f"this {source.title} is for self-attention")
        form = dataclasses.replace(form, encoder_decoder_attention=encoder_decoder_attention)
    state, table = state_of(module, source)
    zeta = to_zeta(state, table, source.title)
    attention = dataclasses.replace(form, biases=biases_in(zeta)).build()
    fill(attention, zeta)
    _copy_gradient_flags(module, attention, table)
    attention.apply(set_split_position(form.split_position))
    return attention.train(module.training)


def to_module(attention: MultiheadAttention, kind: str) -> nn.Module:
    """A module of another library that computes what ``attention`` computes.

    Args:
        attention: It stays as it is.
        kind: ``"torch"`` (batch first), ``"torchscale"``, ``"fairseq"``, ``"t5"``, ``"bart"``,
            ``"bert"``, ``"vit"``, ``"gpt2"``, ``"llama"`` or ``"mistral"``; the library must be
            installed. What such a module has beside its attention is new: BERT's LayerNorm.

    Returns:
        With parameters of its own, of the attention's devices, dtypes and ``requires_grad``, and
        its training mode.

    Raises:
        TypeError: ``attention`` is not Zeta's.
        ValueError: There is no such kind.
        ConversionError: The kind cannot express the attention, or its library is not installed.
    """
    if not isinstance(attention, MultiheadAttention):
        raise TypeError(
            f"attention must be a zeta.nn.MultiheadAttention; got {type(attention).__name__}"
        )
    source = source_of(kind)
    form = Form.of(attention)
    refusals = source.refusals(form)
    if refusals:
        raise ConversionError(f"{source.title} cannot express {'; '.join(refusals)}")
    with torch.random.fork_rng(devices=[]):
        module = source.build(form)
    first = attention.out_proj
    parameter = next(first.parameters())
    module.to(device=parameter.device, dtype=parameter.dtype)
    table = source.table(list(module.state_dict()))
    load(module, from_zeta(attention.state_dict(), table, "the attention"), source)
    flags = _gradient_flags(attention)
    parameters = dict(module.named_parameters())
    for entry in table:
        if entry.source in parameters:
            parameters[entry.source].requires_grad_(any(flags[key] for key in entry.zeta))
    module.apply(set_split_position(form.split_position))
    return module.train(attention.training)


def form_of(module: nn.Module, source: Source) -> Form:
    """A module's form, but for its biases, which its tensors tell.

    Raises:
        ConversionError: It has an option that cannot be expressed, or lacks what its class has.
    """
    try:
        return source.read(module)
    except (AttributeError, KeyError) as error:
        raise ConversionError(
            f"this {source.title} is not as its class makes it: {error}"
        ) from error


def state_of(module: nn.Module, source: Source) -> tuple[StateDict, Table]:
    """A module's own part of its state dict, and the table for it.

    Raises:
        ConversionError: A submodule is not of its class's kind, or a tensor holds no real numbers.
    """
    state: StateDict = dict(module.state_dict())
    own = {key: state[key] for key in source.own(list(state))}
    table = source.table(list(own))
    known = {entry.source for entry in table}
    for name, part in _parts(module, known):
        known_kind = type(part).forward in _FORWARDS or qualified_name(type(part)) in _OTHERS
        if not known_kind or "forward" in vars(part):
            raise ConversionError(
                f"{name} of this {source.title} is a {qualified_name(type(part))}, "
                "whose computation is not known"
            )
    for key, tensor in own.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConversionError(
                f"{key} of this {source.title} must hold real numbers; got {kind}"
            )
    return own, table


def fill(attention: MultiheadAttention, state: StateDict) -> None:
    """Give an attention on the meta device its parameters.

    Raises:
        ConversionError: A tensor has another shape than its place.
    """
    for key, tensor in attention.state_dict().items():
        if key in state and state[key].shape != tensor.shape:
            raise ConversionError(
                f"{key} must have shape {tuple(tensor.shape)}; got {tuple(state[key].shape)}"
            )
    missing = sorted(set(attention.state_dict()) - set(state))
    unexpected = sorted(set(state) - set(attention.state_dict()))
    _check_fits("the attention", {"lacks": missing, "has no place for": unexpected})
    attention.load_state_dict(state, strict=True, assign=True)


def load(module: nn.Module, state: StateDict, source: Source) -> None:
    """Give a source's new module its parameters; what stands apart keeps its own.

    Raises:
        ConversionError: The tensors are not those of the module.
    """
    own = dict(module.state_dict())
    missing = sorted(set(source.own(list(own))) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [key for key in state if key in own and own[key].shape != state[key].shape]
    _check_fits(
        source.title,
        {"lacks": missing, "has no place for": unexpected, "needs other shapes of": shapes},
    )
    module.load_state_dict(state, strict=False, assign=True)


def _check_fits(title: str, problems: dict[str, list[str]]) -> None:
    """Raise ConversionError if there are tensors of some problem, such as "lacks"."""
    found = [f"{verb} {', '.join(names)}" for verb, names in problems.items() if names]
    if found:
        raise ConversionError(f"{title} {' and '.join(found)}")


def _parts(module: nn.Module, known: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """The submodules that hold a known tensor, with their names."""
    for name, part in module.named_modules():
        direct = {f"{name}.{key}" for key, _ in part.named_parameters(recurse=False)}
        if name and direct & known:
            yield name, part


def _gradient_flags(module: nn.Module) -> dict[str, bool]:
    """By every name: one parameter may have several."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: part.requires_grad for name, part in named}


def _copy_gradient_flags(module: nn.Module, attention: MultiheadAttention, table: Table) -> None:
    flags = _gradient_flags(module)
    parameters = dict(attention.named_parameters())
    for entry in table:
        for key in entry.zeta:
            if entry.source in flags and key in parameters:
                parameters[key].requires_grad_(flags[entry.source])
