"""`zeta.swap`: what is replaced, what is kept and why, and that nothing else changes."""

import copy
import io
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchscale.component.multiway_network import set_split_position

import zeta
from tests.convert.swapped import BATCH, EMBED, HEADS, LENGTH, TORCHS, ZETAS, Block, torchscale
from zeta.convert import swapping
from zeta.convert.swapping import Replaced, Swapped
from zeta.integrations import pytorch


def tokens() -> Tensor:
    return torch.randn(BATCH, LENGTH, EMBED)


def tensors_of(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """Each parameter and buffer: which object, and whether it learns."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(tensor), tensor.requires_grad) for name, tensor in named}


def test_it_is_imported_when_it_is_asked_for() -> None:
    code = """
import sys, zeta
above = ("zeta.convert", "zeta.integrations")
print([name for name in sys.modules if name.startswith(above)], "swap" in dir(zeta))
print(zeta.swap.__module__, "transformers" in sys.modules, "torchscale" in sys.modules)
try:
    zeta.swop
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[] True",
        "zeta.convert.swapping False False",
        "module 'zeta' has no attribute 'swop'",
    ]


def test_torchs_attention_becomes_zetas() -> None:
    model = nn.Sequential(Block(), Block(add_bias_kv=True))
    x = tokens()
    expected, before, keys = model(x), tensors_of(model), list(model.state_dict())
    attention = model[0].attention
    report = zeta.swap(model)
    assert report == Swapped(
        (
            Replaced(("0.attention",), TORCHS, ZETAS),
            Replaced(("1.attention",), TORCHS, ZETAS),
        ),
        (),
    )
    assert type(model[0].attention) is pytorch.MultiheadAttention
    assert model[0].attention is attention
    assert tensors_of(model) == before
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)


def test_weights_say_which() -> None:
    model = Block(dropout=0.5)
    zeta.swap(model, weights="torch")
    x = tokens()
    rows = model.attention(x, x, x)[1].sum(-1)
    assert not torch.allclose(rows, torch.ones_like(rows))
    other = Block(dropout=0.5)
    zeta.swap(other)
    rows = other.attention(x, x, x)[1].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize("kind", ["torch", "torchscale"])
def test_dtype_device_mode_and_gradients_are_kept(kind: str) -> None:
    attention: nn.Module = (
        nn.MultiheadAttention(EMBED, HEADS, dropout=0.1) if kind == "torch" else torchscale()
    )
    model = nn.ModuleDict({"attention": attention, "other": torchscale()})
    model.to(torch.bfloat16)
    attention.eval()
    attention.out_proj.weight.requires_grad_(False)
    before = tensors_of(model)
    zeta.swap(model)
    assert tensors_of(model) == before
    assert not model["attention"].training
    assert not model["attention"].out_proj.training
    assert model["other"].training
    assert not model["attention"].out_proj.weight.requires_grad
    on_meta = nn.Sequential(nn.MultiheadAttention(EMBED, HEADS, device="meta"))
    zeta.swap(on_meta)
    assert on_meta[0].in_proj_weight.is_meta


def test_an_optimizer_made_before_goes_on() -> None:
    models = [Block() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    x = tokens()
    for step in range(4):
        if step == 2:
            zeta.swap(models[0])
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["torch", "torchscale"])
def test_a_module_under_two_names_stays_one(kind: str) -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS) if kind == "torch" else torchscale()
    model = nn.ModuleDict({"a": attention, "b": nn.Sequential(attention), "c": attention})
    report = zeta.swap(model)
    assert [entry.names for entry in report.replaced] == [("a", "b.0", "c")]
    assert model["a"] is model["b"][0] is model["c"]
    assert isinstance(model["a"], pytorch.MultiheadAttention | zeta.nn.MultiheadAttention)


@pytest.mark.parametrize("kind", ["torch", "torchscale"])
def test_parameters_shared_by_two_modules_stay_shared(kind: str) -> None:
    make = (lambda: nn.MultiheadAttention(EMBED, HEADS)) if kind == "torch" else torchscale
    model = nn.Sequential(make(), make())
    model[1].out_proj.weight = model[0].out_proj.weight
    zeta.swap(model)
    assert model[1].out_proj.weight is model[0].out_proj.weight


@pytest.mark.parametrize("kind", ["torch", "torchscale"])
def test_hooks_and_their_handles_are_kept(kind: str) -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS) if kind == "torch" else torchscale()
    model = nn.Sequential(attention)
    seen: list[str] = []

    def note(what: str) -> Any:
        return lambda *_, **__: seen.append(what)

    handles = [
        attention.register_forward_pre_hook(note("before")),
        attention.register_forward_hook(note("after"), with_kwargs=True),
        attention.register_full_backward_hook(note("backward")),
        attention.out_proj.register_forward_hook(note("projection")),
        attention.register_load_state_dict_pre_hook(note("loading")),
        attention.register_load_state_dict_post_hook(note("loaded")),
    ]
    zeta.swap(model)
    del attention
    x = tokens().requires_grad_()
    model[0](x, x, x)[0].sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["before", "projection", "after", "backward", "loading", "loaded"]
    for handle in handles:
        handle.remove()
    model[0](x, x, x)[0].sum().backward()
    model.load_state_dict(model.state_dict())
    assert len(seen) == 6


@pytest.mark.parametrize("options", [{}, {"subln": True}, {"xpos": True}, {"multiway": True}])
def test_torchscales_attention_becomes_zetas(options: dict[str, Any]) -> None:
    model = nn.ModuleList([torchscale(**options)])
    if "multiway" in options:
        model.apply(set_split_position(2))
    x = tokens()
    expected, expected_weights = model[0](x, x, x)
    before, keys = tensors_of(model), list(model.state_dict())
    report = zeta.swap(model)
    assert report.replaced == (
        Replaced(
            ("0",),
            "torchscale.component.multihead_attention.MultiheadAttention",
            "zeta.nn.attention.MultiheadAttention",
        ),
    )
    parameters = {name: entry for name, entry in tensors_of(model).items() if name in before}
    assert parameters.keys() == before.keys()
    assert all(parameters[name] == before[name] for name, _ in model.named_parameters())
    assert sorted(model.state_dict()) == sorted(keys)
    found, weights = model[0](x, x, x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights.clone(), expected_weights)


class TorchScaleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = torchscale(dropout=0.0, subln=True)

    def forward(self, x: Tensor) -> Tensor:
        # As TorchScale's own decoder calls it.
        mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
        out, _ = self.self_attn(
            query=x, key=x, value=x, key_padding_mask=None, incremental_state=None, attn_mask=mask,
            rel_pos=None,
        )  # fmt: skip
        return torch.as_tensor(out)


def test_a_torchscale_model_runs_on() -> None:
    model = TorchScaleBlock()
    x = tokens()
    expected = model(x)
    zeta.swap(model)
    torch.testing.assert_close(model(x), expected)


def test_a_swapped_model_is_copied_and_saved() -> None:
    model = nn.Sequential(Block())
    zeta.swap(model)
    x = tokens()
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    fresh = nn.Sequential(Block())
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    for other in (copy.deepcopy(model), fresh):
        torch.testing.assert_close(other(x), model(x))


def test_the_model_itself_may_be_torchs() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS)
    report = zeta.swap(module)
    assert report.replaced[0].names == ("",)
    assert type(module) is pytorch.MultiheadAttention
    assert str(report).splitlines()[1] == f"  replaced the model itself: {TORCHS} is now {ZETAS}"


def test_the_model_itself_may_not_be_torchscales() -> None:
    module = torchscale()
    words = (
        "model is itself a torchscale.component.multihead_attention.MultiheadAttention, which can "
        "only be replaced inside another module; zeta.convert.from_module(model) makes one of "
        "Zeta's"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        zeta.swap(module)


def test_a_second_time_there_is_nothing_to_do() -> None:
    model = nn.Sequential(Block(), zeta.nn.MultiheadAttention(None, EMBED, HEADS))
    zeta.swap(model)
    hooks = len(model[0].attention._forward_pre_hooks)
    report = zeta.swap(model)
    assert report.replaced == ()
    assert [(entry.names, entry.reason) for entry in report.kept] == [
        (("0.attention",), "it is Zeta's already"),
        (("1",), "it is Zeta's already"),
    ]
    assert len(model[0].attention._forward_pre_hooks) == hooks


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"a": Block(), "b": torchscale(), "c": torchscale(), "d": Block()})
    seen: list[int] = []
    convert = swapping.from_module

    def failing(module: nn.Module) -> Any:
        seen.append(1)
        if len(seen) == 2:
            raise MemoryError("no room")
        return convert(module)

    monkeypatch.setattr(swapping, "from_module", failing)

    def described() -> list[Any]:
        return [
            (name, id(module), type(module), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ]

    before, tensors = described(), tensors_of(model)
    with pytest.raises(MemoryError, match="no room"):
        zeta.swap(model)
    assert described() == before
    assert tensors_of(model) == tensors
    monkeypatch.undo()
    zeta.swap(model)
    assert described() != before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([Block()],), TypeError, "model must be an nn.Module; got list"),
        ((nn.Linear,), TypeError, "model must be an nn.Module; got type"),
    ],
)
def test_what_is_no_model(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        zeta.swap(*arguments)


def test_unknown_weights_change_nothing() -> None:
    model = Block()
    with pytest.raises(ValueError, match=r"^weights must be 'zeta' or 'torch'; got 'mean'$"):
        zeta.swap(model, weights="mean")
    assert type(model.attention) is nn.MultiheadAttention


def test_a_model_without_attention() -> None:
    report = zeta.swap(nn.Sequential(nn.Linear(2, 2)))
    assert report == Swapped((), ())
    assert str(report) == "0 replaced, 0 kept"
