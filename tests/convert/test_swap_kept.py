"""`zeta.swap`: which modules it leaves as they are, and the reasons that it gives."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torchscale.component.multihead_attention import MultiheadAttention as TorchScale

import zeta
from tests.convert.swapped import EMBED, HEADS, TORCHS, ZETAS, Block, torchscale
from zeta.convert import ConversionError, swapping
from zeta.convert.swapping import Kept


class Tuned(nn.MultiheadAttention):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        out, weights = super().forward(*arguments, **options)
        return 2 * out, weights


class WindowAttention(nn.Module):
    pass


class AttentionBlock(Block):
    pass


class OtherScale(TorchScale):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        return super().forward(*arguments, **options)


def quantised() -> TorchScale:
    module = torchscale()
    module.q_proj = nn.Sequential(module.q_proj)
    return module


def parametrised() -> nn.Module:
    module = nn.MultiheadAttention(EMBED, HEADS)
    torch.nn.utils.parametrize.register_parametrization(module, "in_proj_weight", nn.Identity())
    return module


def patched() -> nn.Module:
    module = nn.MultiheadAttention(EMBED, HEADS)
    module.forward = module.forward
    return module


def compiled() -> nn.Module:
    module = nn.MultiheadAttention(EMBED, HEADS)
    module.compile(backend="eager")
    return module


def zetascale(**attributes: Any) -> nn.Module:
    # The package is called as this one, so its class can only be made to look so.
    kind = type("MultiheadAttention", (TorchScale,), {})
    kind.__module__ = "zeta.nn.attention.multihead_attention"
    module = torchscale(multiway=True)
    module.__class__ = kind
    del module.args
    vars(module).update(attributes)
    return module


def fairseq() -> nn.Module:
    kind = type("MultiheadAttention", (nn.Module,), {})
    kind.__module__ = "fairseq.modules.multihead_attention"
    return kind()


SUBCLASS = "it is a subclass of torch.nn.MultiheadAttention, which may compute something else"
KEPT = {
    "a subclass": (lambda: Tuned(EMBED, HEADS), SUBCLASS),
    "parametrised": (parametrised, SUBCLASS),
    "patched": (patched, "its forward has been replaced"),
    "of fairseq": (fairseq, swapping._OTHER_CALLS),
    "compiled": (compiled, "it has been compiled: swap first, then compile"),
    "drops all": (
        lambda: nn.MultiheadAttention(EMBED, HEADS, dropout=1.0),
        "its dropout must be in [0, 1); got 1.0",
    ),
    "unknown": (WindowAttention, "Zeta does not know this class"),
    "zetascale": (
        zetascale,
        "it returns the output alone, and zeta.nn.MultiheadAttention the weights too",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_replaced_is_kept(name: str) -> None:
    make, reason = KEPT[name]
    model = nn.Sequential(make(), Block())
    module, kind, state = model[0], type(model[0]), dict(vars(model[0]))
    report = zeta.swap(model)
    assert report.kept == (Kept(("0",), swapping.qualified_name(kind), reason),)
    assert [entry.names for entry in report.replaced] == [("1.attention",)]
    assert model[0] is module
    assert type(model[0]) is kind
    assert vars(module) == state


@pytest.mark.parametrize("make", [quantised, lambda: OtherScale(*_scale_arguments())])
def test_a_torchscale_module_of_its_own_kind_is_kept(make: Any) -> None:
    model = nn.Sequential(make())
    module = model[0]
    report = zeta.swap(model)
    with pytest.raises(ConversionError) as caught:
        zeta.convert.from_module(module)
    assert [entry.reason for entry in report.kept] == [str(caught.value)]
    assert model[0] is module


def _scale_arguments() -> tuple[Any, ...]:
    return torchscale().args, EMBED, HEADS, 0.0, True


def test_zetascales_older_module_is_replaced() -> None:
    model = nn.Sequential(zetascale(args=None))
    assert [entry.names for entry in zeta.swap(model).replaced] == [("0",)]


def test_a_block_that_is_called_so_is_no_attention() -> None:
    report = zeta.swap(nn.Sequential(AttentionBlock()))
    assert report.kept == ()
    assert [entry.names for entry in report.replaced] == [("0.attention",)]


def test_transformers_attention_is_reported() -> None:
    from transformers import BertConfig, BertModel, T5Config, T5Model

    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9, "num_attention_heads": 2}
    bert = BertModel(BertConfig(num_hidden_layers=1, **sizes))
    t5 = T5Model(T5Config(d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1, vocab_size=9))
    before = [type(module) for module in t5.modules()]
    report = zeta.swap(nn.ModuleDict({"bert": bert, "t5": t5}))
    assert report.replaced == ()
    assert {entry.reason for entry in report.kept} == {swapping._TRANSFORMERS}
    assert "zeta.integrations.huggingface" in swapping._TRANSFORMERS
    assert [entry.names for entry in report.kept] == [
        ("bert.encoder.layer.0.attention.self",),
        ("t5.encoder.block.0.layer.0.SelfAttention",),
        ("t5.decoder.block.0.layer.0.SelfAttention",),
        ("t5.decoder.block.0.layer.1.EncDecAttention",),
    ]
    assert [type(module) for module in t5.modules()] == before


def test_the_report_reads_well() -> None:
    model = nn.ModuleDict({"block": Block(), "window": WindowAttention()})
    report = zeta.swap(model)
    kind = swapping.qualified_name(WindowAttention)
    assert str(report).splitlines() == [
        "1 replaced, 1 kept",
        f"  replaced block.attention: {TORCHS} is now {ZETAS}",
        f"  kept     window: {kind}: Zeta does not know this class",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.kept = ()
