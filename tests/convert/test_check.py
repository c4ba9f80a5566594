"""`convert.check`: proofs that must fail, what they compare and what they say."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.convert.sources import MODULES, converted, kind_of, make
from zeta import convert
from zeta.convert import checking
from zeta.nn import MultiheadAttention, RelativePositionBias, RotaryEmbedding


def perturb(attention: nn.Module, name: str, by: float = 1e-3) -> None:
    with torch.no_grad():
        tensor = attention.state_dict()[name]
        tensor.view(-1)[-1] += by * (1.0 + tensor.view(-1)[-1].abs())


EVERY_KIND = list({kind_of(name): name for name in reversed(MODULES)}.values())


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each proof the first call and the last, which splits multiway modules."""
    every = checking.calls
    monkeypatch.setattr(checking, "calls", lambda *given: [list(every(*given))[i] for i in (0, -1)])


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.usefixtures("few_calls")
def test_a_perturbed_weight_fails(name: str) -> None:
    module = make(name)
    for key in converted(module)[0].state_dict():
        attention, bias = converted(module)
        perturb(attention, key)
        report = convert.check(module, attention, rel_pos=bias)
        assert not report.passed
        assert report.changed == (key,)
        words = rf"(?s)not exact.*DIFFERENT.*{key} differs"
        with pytest.raises(convert.ConversionError, match=words):
            report.require()


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.usefixtures("few_calls")
def test_the_numbers_alone_show_a_perturbed_weight(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_differences", lambda *_: ([], 1))
    module = make(name)
    attention, bias = converted(module)
    assert convert.check(module, attention, rel_pos=bias).passed
    for key in attention.state_dict():
        # A key's bias moves all scores of a query alike, which no softmax notices; the buffer of
        # xPos is never read.
        if ("k_proj" in key and "bias" in key and "llama" not in name) or key == "xpos.scale":
            continue
        attention, bias = converted(module)
        perturb(attention, key)
        report = convert.check(module, attention, rel_pos=bias)
        assert not all(case.within(report.tolerance) for case in report.cases), key


def test_a_perturbed_position_bias_fails() -> None:
    module = make("t5, encoder bias")
    attention, bias = converted(module)
    assert bias is not None
    perturb(bias, "relative_attention_bias.weight", 1e-2)
    report = convert.check(module, attention, rel_pos=bias)
    assert not report.passed
    assert report.changed == ("rel_pos.relative_attention_bias.weight",)


def changed(attention: MultiheadAttention, **fields: Any) -> MultiheadAttention:
    for name, value in fields.items():
        setattr(attention, name, value)
    return attention


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("torch", {"scale": 0.51}),
        ("t5", {"scale": 5**-0.5}),
        ("torch", {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}),
        ("torch", {"num_extra_keys": 1, "add_zero_attn": True}),
        ("torch, zero key", {"num_extra_keys": 0}),
        ("fairseq, extra keys", {"add_zero_attn": False}),
        ("llama", {"xpos": RotaryEmbedding(8)}),
        ("llama", {"xpos": RotaryEmbedding(8, interleaved=False, base=9000.0)}),
        ("llama", {"xpos": None}),
        ("mistral", {"window": 4}),
        ("mistral", {"window": 6}),
        ("mistral", {"window": None}),
    ],
)
def test_another_function_of_the_same_parameters_fails(name: str, fields: dict[str, Any]) -> None:
    module = make(name)
    report = convert.check(module, changed(convert.from_module(module), **fields))
    assert report.changed == ()
    assert not report.passed


@pytest.mark.parametrize("field", ["bidirectional", "max_distance", "num_buckets"])
def test_another_position_bias_of_the_same_table_fails(field: str) -> None:
    module = make("t5, encoder bias")
    attention, bias = converted(module)
    assert bias is not None
    value = {"bidirectional": False, "max_distance": 24, "num_buckets": 32}[field]
    other = RelativePositionBias(
        **{"bidirectional": True, "max_distance": 20, "num_buckets": 32, field: value},  # type: ignore[arg-type]  # of three types
        n_heads=4,
    )
    other.load_state_dict(bias.state_dict())
    report = convert.check(module, attention, rel_pos=other)
    assert report.changed == ()
    assert report.passed == (field == "num_buckets")


@pytest.mark.parametrize("gradient", ["inputs", "parameters"])
def test_wrong_gradients_fail(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make("bart")
    attention = convert.from_module(module)
    right = checking._Pair._ours

    def wrong(self: Any, *arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
        found = {"inputs": 0, "parameters": 1}
        both = right(self, *arguments)
        both[found[gradient]][-1].view(-1)[0] += 1e-3
        return both

    monkeypatch.setattr(checking._Pair, "_ours", wrong)
    report = convert.check(module, attention)
    assert not report.passed
    assert all(getattr(case, gradient) > 1e-6 for case in report.cases[:-1])


def test_fairseq_decodes_with_zeros_and_not_with_a_learned_key() -> None:
    for name, decodes in (("fairseq, zero key", True), ("fairseq, learned key", False)):
        module = make(name)
        report = convert.check(module, convert.from_module(module))
        assert (report.cases[-1].name == "decoding token by token") == decodes
        assert ("decoding" in report.not_compared) != decodes
        assert any(case.name == "self, every key hidden" for case in report.cases)
        assert "queries whose keys are all hidden" not in report.not_compared
    reason = "with add_bias_kv fairseq's cache has the learned key once more at each step"
    assert report.not_compared["decoding"] == reason


@pytest.mark.parametrize("name", ["bart", "t5", "bert, cross", "gpt2, cross", "fairseq, cross"])
def test_a_cross_attention_decodes_over_an_encoders_keys(name: str) -> None:
    module = make(name)
    attention = convert.from_module(module, encoder_decoder_attention=True)
    report = convert.check(module, attention)
    assert report.passed, str(report)
    assert report.cases[-1].name == "decoding, cross"
    assert "decoding" not in report.not_compared
    attention.scale *= 1.1
    assert not convert.check(module, attention).cases[-1].within(report.tolerance)


def test_a_cross_attention_without_a_cache_of_its_own_is_compared_otherwise() -> None:
    module = make("torchscale, cross")
    report = convert.check(module, convert.from_module(module))
    assert report.passed
    assert report.not_compared["decoding"] == "this torchscale MultiheadAttention is not for it"


@pytest.mark.parametrize(
    ("name", "part", "cross"),
    [
        ("bart", "", False), ("bart", "", True), ("t5", "", True),
        ("bert", "self", False), ("bert, cross", "self", True),
    ],
)  # fmt: skip
def test_what_no_cache_knows_is_compared_without(name: str, part: str, cross: bool) -> None:
    module = make(name)
    module.get_submodule(part).layer_idx = None  # type: ignore[assignment]  # no tensor
    attention = convert.from_module(module, encoder_decoder_attention=cross)
    report = convert.check(module, attention)
    assert report.passed, str(report)
    assert report.not_compared["decoding"] == (
        "the module has no layer_idx, by which caches of Transformers know it"
    )


def test_nothing_compared_is_not_a_pass() -> None:
    module = make("torch")
    report = convert.check(module, convert.from_module(module))
    assert not dataclasses.replace(report, cases=()).passed
    nan = dataclasses.replace(report.cases[0], output=float("nan"))
    assert not dataclasses.replace(report, cases=(nan,)).passed


def test_a_report_is_a_table() -> None:
    module = make("mistral")
    text = str(convert.check(module, convert.from_module(module)))
    first, second, columns, *rows = text.splitlines()
    assert first == "transformers MistralAttention and zeta.nn.MultiheadAttention: equal"
    assert second == "largest errors, relative, in float64; up to 1e-05 passes"
    assert columns.split() == ["output", "weights", "inputs", "parameters"]
    assert any(row.startswith("  decoding token by token") for row in rows)
    assert "parameters the same bit for bit: 4 of 4" in rows
    assert "  dropout: the two draw from different generators; both are run without it" in rows
    assert len({len(row) for row in [columns, *rows[: rows.index("not compared:") - 1]]}) == 1


def test_a_window_wider_than_the_inputs_is_not_called_compared() -> None:
    module = make("mistral")
    report = convert.check(module, convert.from_module(module), length=5)
    assert report.not_compared["window"] == "it is 5 tokens wide, the inputs 5 long"
    assert "window" not in convert.check(module, convert.from_module(module)).not_compared


@pytest.mark.parametrize("name", EVERY_KIND)
def test_float32_is_enough(name: str) -> None:
    module = make(name)
    attention, bias = converted(module)
    report = convert.check(module, attention, rel_pos=bias, dtype=torch.float32)
    assert report.tolerance == 1e-4
    assert report.passed, str(report)
