"""The sources that are known, by kind and by class."""

from torch import nn

from zeta.convert.bart import BART
from zeta.convert.bert import BERT
from zeta.convert.errors import ConversionError
from zeta.convert.fairseq import FAIRSEQ
from zeta.convert.gpt2 import GPT2
from zeta.convert.llama import LLAMA, MISTRAL
from zeta.convert.source import Source, qualified_name
from zeta.convert.t5 import T5
from zeta.convert.torch_nn import TORCH
from zeta.convert.torchscale import TORCHSCALE
from zeta.convert.vit import VIT
from zeta.convert.zetascale import ZETASCALE
from zeta.nn import MultiheadAttention

SOURCES = {
    source.kind: source
    for source in (
        TORCH, TORCHSCALE, FAIRSEQ, ZETASCALE, T5, BART, BERT, VIT, GPT2, LLAMA, MISTRAL,
    )
}  # fmt: skip

_BERT = "transformers.models.bert.modeling_bert."
_INSTEAD = {
    _BERT + "BertSelfAttention": "BertAttention, which holds it and the output projection",
    _BERT + "BertCrossAttention": "BertAttention, which holds it and the output projection",
}


def source_of(kind: str) -> Source:
    """The source of a kind.

    Raises:
        ValueError: There is none.
    """
    if kind not in SOURCES:
        raise ValueError(f"kind must be one of {', '.join(SOURCES)}; got {kind!r}")
    return SOURCES[kind]


def recognise(module: nn.Module) -> Source:
    """The source that a module comes from.

    Raises:
        TypeError: It is no module.
        ConversionError: It is of no known class, or of one that computes in a way of its own.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module; got {type(module).__name__}")
    if isinstance(module, MultiheadAttention):
        raise ConversionError("the module is a zeta.nn.MultiheadAttention already")
    name = qualified_name(type(module))
    if name in _INSTEAD:
        raise ConversionError(f"{name} has no output projection: convert the {_INSTEAD[name]}")
    for base in type(module).__mro__:
        for source in SOURCES.values():
            if qualified_name(base) in source.classes:
                _check_unchanged(module, base)
                return source
    titles = ", ".join(source.title for source in SOURCES.values())
    raise ConversionError(f"cannot convert {name}; known are {titles}")


def _check_unchanged(module: nn.Module, base: type) -> None:
    """Raise ConversionError if a subclass or an instance computes in a way of its own."""
    for name in ("forward", "__call__", "_call_impl"):
        if getattr(type(module), name, None) is not getattr(base, name, None):
            raise ConversionError(
                f"cannot convert {qualified_name(type(module))}: it is a {qualified_name(base)} "
                f"with a {name} of its own"
            )
    if "forward" in vars(module):
        raise ConversionError(
            f"cannot convert this {qualified_name(base)}: its forward has been replaced"
        )
