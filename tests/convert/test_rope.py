"""Scaled rotations of Llama and Mistral, against Transformers' own code in float64 throughout."""

import importlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.convert.sources import LINEAR, LLAMA3, UNTRUNCATED, YARN, scaled
from zeta import convert
from zeta.convert import ConversionError
from zeta.convert.forms import Form
from zeta.convert.rope import read_rotary
from zeta.nn import (
    LinearScaling,
    Llama3Scaling,
    MultiheadAttention,
    RotaryEmbedding,
    YarnScaling,
)

EXACT = {"rtol": 0.0, "atol": 1e-12}
MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}
ROPES = {
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, untruncated": UNTRUNCATED,
    "yarn, mscale": MSCALE,
}
each_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
each_model = pytest.mark.parametrize("model", ["llama", "mistral"])


class Wide:
    """torch, but for its float32, which is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers takes rotations, norms and softmax in float32 whatever the dtype: here not."""
    for name in (
        "modeling_rope_utils",
        "models.llama.modeling_llama",
        "models.mistral.modeling_mistral",
    ):
        monkeypatch.setattr(importlib.import_module(f"transformers.{name}"), "torch", Wide())


def embedding(module: Any) -> Any:
    """The module that makes a model's tables."""
    modeling = importlib.import_module(type(module).__module__)
    name = type(module).__name__.replace("Attention", "RotaryEmbedding")
    return getattr(modeling, name)(module.config)


@each_model
@each_rope
@pytest.mark.usefixtures("_wide")
def test_outputs_weights_and_gradients_are_equal(model: str, rope: dict[str, Any]) -> None:
    """Over sequences twice as long as the original context."""
    module = scaled(model, rope).double()
    assert convert.from_module(module).xpos.scaling is not None
    report = convert.check(module, convert.from_module(module), batch=1, length=96, tolerance=1e-12)
    assert report.passed, str(report)
    assert any(case.name.startswith("decoding") for case in report.cases)
    assert all(
        case.inputs is not None and case.parameters is not None
        for case in report.cases
        if not case.name.startswith("decoding")
    )


@each_model
@each_rope
@pytest.mark.usefixtures("_wide")
def test_far_positions_in_prefill_and_decoding(model: str, rope: dict[str, Any]) -> None:
    from transformers import DynamicCache

    options = {"sliding_window": None} if model == "mistral" else {}
    module = scaled(model, rope, **options).double().eval()
    attention = convert.from_module(module)
    tables, cache, state = embedding(module), DynamicCache(), {}
    x, positions = torch.randn(2, 70, 32, dtype=torch.float64), torch.arange(70) + 1000
    seen = 0
    for size in (50, 11, 1, 1, 7):
        part, at = x[:, seen : seen + size], positions[seen : seen + size]
        hidden = positions[None, : seen + size] > at[:, None]
        added = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, float("-inf"))
        expected, _ = module(
            part,
            position_embeddings=tables(part, at[None]),
            attention_mask=added[None, None],
            past_key_values=cache,
        )
        found, _ = attention(part, part, part, state, is_causal=True, positions=at)
        torch.testing.assert_close(found, expected, **EXACT)
        seen += size
    torch.testing.assert_close(state["prev_key"], cache.layers[0].keys, **EXACT)


class Ours(nn.Module):
    """An attention of Zeta's in a layer of Transformers', with a cache of its own."""

    def __init__(self, attention: MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention
        self.state: dict[str, Any] | None = None

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        x = hidden_states
        return self.attention(x, x, x, self.state, is_causal=True, need_weights=False)[0], None


def causal_lm(model: str, rope: dict[str, Any]) -> Any:
    """A small language model, every parameter random, in float64."""
    config = scaled(model, rope).config
    for name, value in {"num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 50}.items():
        setattr(config, name, value)
    config._attn_implementation = "eager"
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    made = getattr(modeling, f"{model.title()}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return made


@pytest.mark.parametrize(
    ("model", "rope"), [("llama", LLAMA3), ("llama", YARN), ("mistral", LINEAR)]
)
@pytest.mark.usefixtures("_wide")
def test_logits_of_a_model(model: str, rope: dict[str, Any]) -> None:
    theirs, ours = causal_lm(model, rope), causal_lm(model, rope)
    ours.load_state_dict(theirs.state_dict())
    for layer in ours.model.layers:
        layer.self_attn = Ours(convert.from_module(layer.self_attn))
    tokens = torch.randint(50, (2, 70))
    results = [lm(tokens, use_cache=False).logits for lm in (theirs, ours)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)
    embeddings = [lm.model.embed_tokens.weight for lm in (theirs, ours)]
    gradients = [
        torch.autograd.grad(logits.square().mean(), weight)[0]
        for logits, weight in zip(results, embeddings, strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)

    for layer in ours.model.layers:
        layer.self_attn.state = {}
    cache = None
    for part in (tokens[:, :65], *tokens[:, 65:].split(1, dim=1)):
        with torch.no_grad():
            found = ours(part, use_cache=False).logits
            answer = theirs(part, past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        torch.testing.assert_close(found, answer.logits, rtol=0, atol=1e-10)


# As their configurations have them.
PUBLISHED = {
    "Llama 3.1": (
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, 128,
    ),
    "Llama 3.2": (
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, 64,
    ),
    "YaRN for Llama 2": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0,
         "original_max_position_embeddings": 4096}, 128,
    ),
    "GPT-OSS": (
        {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
         "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096}, 64,
    ),
    "DeepSeek": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "beta_fast": 32,
         "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 1.0,
         "original_max_position_embeddings": 4096}, 64,
    ),
    "mscale alone": ({**YARN, "mscale": 0.7}, 64),
    "mscale of nothing": ({**YARN, "mscale": 0.7, "mscale_all_dim": 0.0}, 64),
    "mscale and a factor": ({**MSCALE, "attention_factor": 1.1}, 64),
    "no slow pair": (
        {"rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0,
         "original_max_position_embeddings": 8192}, 64,
    ),
    "no fast pair": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
         "original_max_position_embeddings": 6}, 64,
    ),
    "no pair that turns once": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
         "original_max_position_embeddings": 3}, 64,
    ),
    "no larger scores": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 0.5,
         "original_max_position_embeddings": 4096}, 64,
    ),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4}, 64),
}  # fmt: skip


@pytest.mark.parametrize(("rope", "head_dim"), PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.usefixtures("_wide")
def test_frequencies_of_published_models(rope: dict[str, Any], head_dim: int) -> None:
    theirs = embedding(scaled("llama", rope, head_dim=head_dim))
    rotary = read_rotary(rope)
    assert rotary.scaling is not None
    found = rotary.scaling.frequencies(head_dim, base=rotary.base)
    torch.testing.assert_close(found, theirs.inv_freq, rtol=1e-14, atol=0)
    assert rotary.scaling.magnitude == pytest.approx(theirs.attention_scaling, rel=1e-15)


@each_model
@each_rope
def test_there_and_back_again(model: str, rope: dict[str, Any]) -> None:
    attention = convert.from_module(scaled(model, rope))
    module: Any = convert.to_module(attention, model)
    assert Form.of(convert.from_module(module)) == Form.of(attention)
    written = module.config.rope_parameters
    expected = {key: value for key, value in rope.items() if not key.startswith("mscale")}
    assert {key: written[key] for key in expected} == expected
    if rope["rope_type"] != "linear":
        # Otherwise Transformers says that it does not fit the factor.
        assert module.config.max_position_embeddings == 384
    tables, original = embedding(module), embedding(scaled(model, rope))
    assert torch.equal(tables.inv_freq, original.inv_freq)
    assert tables.attention_scaling == pytest.approx(original.attention_scaling)


def test_what_older_files_say() -> None:
    config = {"rope_parameters": None, "rope_theta": 300.0}
    linear = scaled("llama", {}, **config, rope_scaling={"type": "linear", "factor": 3.0})
    found: Any = convert.from_module(linear).xpos
    assert (found.base, found.scaling) == (300.0, LinearScaling(3.0))
    older = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    found = convert.from_module(scaled("llama", {}, **config, rope_scaling=older)).xpos
    expected = Llama3Scaling(
        8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=48
    )
    assert (found.base, found.scaling) == (300.0, expected)


@pytest.mark.parametrize(
    ("rope", "other"),
    [
        (LINEAR, None),
        (LINEAR, LinearScaling(2.4)),
        (LLAMA3, None),
        (
            LLAMA3,
            Llama3Scaling(
                8.0, low_freq_factor=1.0, high_freq_factor=4.2, original_max_position_embeddings=48
            ),
        ),
        (
            YARN,
            YarnScaling(
                8.0,
                original_max_position_embeddings=48,
                beta_fast=6.0,
                beta_slow=0.5,
                attention_factor=1.2,
            ),
        ),
    ],
)
def test_another_scaling_fails(rope: dict[str, Any], other: Any) -> None:
    module = scaled("llama", rope)
    attention = convert.from_module(module)
    attention.xpos = RotaryEmbedding(8, base=100.0, interleaved=False, scaling=other)
    report = convert.check(module, attention)
    assert report.changed == ()
    assert not report.passed


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4, "factor": 8.0, "original_max_position_embeddings": 48,
}  # fmt: skip
BY_LENGTH = (
    "cannot be converted: its frequencies change with the length of the sequence, but cached keys "
    "are rotated already"
)


@each_model
@pytest.mark.parametrize(
    ("rope", "changes", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, {}, f"rope_type='dynamic' {BY_LENGTH}"),
        (LONGROPE, {}, f"rope_type='longrope' {BY_LENGTH}"),
        (LINEAR, {"rope_type": "spiral"},
         "rope_type='spiral' cannot be converted; known are default, linear, llama3, yarn"),
        (LINEAR, {"factor": ...}, "rope_type='linear' needs factor"),
        (LINEAR, {"factor": 0.0}, "'linear' cannot be converted: factor must be positive and fin"),
        (LLAMA3, {"factor": None}, "factor must be a number; got NoneType"),
        (LLAMA3, {"low_freq_factor": ..., "high_freq_factor": ...},
         "rope_type='llama3' needs low_freq_factor, high_freq_factor"),
        (LLAMA3, {"original_max_position_embeddings": ...},
         "rope_type='llama3' needs original_max_position_embeddings"),
        (LLAMA3, {"original_max_position_embeddings": -1},
         "original_max_position_embeddings must be positive and finite; got -1"),
        (LLAMA3, {"high_freq_factor": 1.0},
         "high_freq_factor must be more than low_freq_factor=1.0; got 1.0"),
        (YARN, {"original_max_position_embeddings": ...},
         "rope_type='yarn' needs original_max_position_embeddings"),
        (YARN, {"beta_slow": 9.0}, "beta_fast must be more than beta_slow=9.0; got 6.0"),
        (YARN, {"attention_factor": 0.0}, "attention_factor must be positive and finite; got 0.0"),
        (YARN, {"truncate": None}, "truncate must be True or False; got None"),
        (MSCALE, {"mscale": -9.0}, "attention_factor must be positive and finite; got -0."),
        (LINEAR, {"rope_theta": 0.0}, "rope_theta must be a positive number; got 0.0"),
        (LINEAR, {"rope_theta": None}, "rope_theta must be a positive number; got None"),
        (LINEAR, {"partial_rotary_factor": 0.5},
         "partial_rotary_factor=0.5 cannot be converted: Llama and Mistral of Transformers rotate "
         "whole heads"),
    ],
)  # fmt: skip
def test_refused(model: str, rope: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    """``...`` for a parameter that is missing, which Transformers itself would not have."""
    module: Any = scaled(model, rope)
    parameters = module.config.rope_parameters
    parameters.update(changes)
    for name in [name for name, value in changes.items() if value is ...]:
        del parameters[name]
    with pytest.raises(ConversionError, match=re.escape(words)):
        convert.from_module(module)


def test_a_scaling_of_the_users_own_is_not_written() -> None:
    class Mine(LinearScaling):
        pass

    position = RotaryEmbedding(4, interleaved=False, scaling=Mine(2.0))
    attention = MultiheadAttention(None, 16, 4, position=position, self_attention=True, bias=False)
    with pytest.raises(ConversionError, match="scaling=Mine cannot be converted"):
        convert.to_module(attention, "llama")
