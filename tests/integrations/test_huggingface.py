"""Transformers' models on Zeta: small random models of each family against ``eager``."""

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import zeta
from tests.integrations.huggingface_families import (
    ENDS,
    FAMILIES,
    SIZES,
    Family,
    results,
    softmax_in_float64,
    valid,
)
from tests.ops.bound import assert_within_bound
from zeta.integrations import huggingface
from zeta.integrations.huggingface.functions import attention

pytestmark = pytest.mark.usefixtures("registered")

GENERATING = [family for family in FAMILIES.values() if family.generates]
CASES = [
    (family, padding)
    for family in FAMILIES.values()
    for padding in (None, "right", "left")
    if padding is None or family.kind != "image"
]


def named(value: Any) -> str:
    return value.name if isinstance(value, Family) else str(value)


@functools.cache
def eager(family: Family, padding: str | None, dtype: torch.dtype) -> dict[str, Tensor]:
    model = family.build(dtype, "eager").train()
    with softmax_in_float64(pytest.MonkeyPatch()):
        return results(family, model, family.inputs(padding, dtype))


def assert_keeps_the_bound(family: Family, padding: str | None, **changes: Any) -> None:
    model = family.build(torch.float32, "zeta", **changes).train()
    given = family.inputs(padding, torch.float32)
    found = results(family, model, given)
    oracle = eager(family, padding, torch.float64)
    # One rounding for each layer there and back; small parameters leave little room for luck.
    rounding = 4 * torch.finfo(torch.float32).eps
    assert_within_bound(found, eager(family, padding, torch.float32), oracle, rounding)
    with torch.no_grad():
        torch.testing.assert_close(
            valid(family, given, model.eval()(**given)), found["output"], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(("family", "padding"), CASES, ids=named)
def test_outputs_and_gradients_keep_the_bound(family: Family, padding: str | None) -> None:
    assert_keeps_the_bound(family, padding)


@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_a_structured_bias_keeps_the_bound(padding: str | None) -> None:
    huggingface.register(structured_bias=True)
    assert_keeps_the_bound(FAMILIES["t5"], padding)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=named)
def test_attentions_equal_and_are_lazy(family: Family) -> None:
    given = family.inputs(None if family.kind == "image" else "right", torch.float64)
    model = family.build(torch.float64, "eager")
    with softmax_in_float64(pytest.MonkeyPatch()):
        expected = model(**given, output_attentions=True)
    model.set_attn_implementation("zeta")
    found = model(**given, output_attentions=True)
    keys = [key for key in expected if "attentions" in key and expected[key]]
    assert keys
    for key in keys:
        for weights, wanted in zip(found[key], expected[key], strict=True):
            assert isinstance(weights, zeta.LazyWeights)
            assert not weights.materialized
            # The first sequence has no padding: every row is one that eager defines.
            torch.testing.assert_close(weights[0], wanted[0])


def generated(model: Any, family: Family, padding: str | None, **options: Any) -> Any:
    with softmax_in_float64(pytest.MonkeyPatch()):
        return model.generate(
            **family.prompt(padding, torch.float64),
            max_new_tokens=4,
            max_length=None,
            do_sample=False,
            return_dict_in_generate=True,
            output_attentions=True,
            **options,
        )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", GENERATING, ids=named)
def test_generation_equals_eager(family: Family, cache: str) -> None:
    model = family.build(torch.float64, "eager")
    given = {"family": family, "padding": "left", "cache_implementation": cache}
    expected = generated(model, **given)
    model.set_attn_implementation("zeta")
    found = generated(model, **given)
    assert torch.equal(found.sequences, expected.sequences)
    if family.name == "whisper":
        return
    key = "attentions" if family.kind == "decoder" else "decoder_attentions"
    for step, wanted in zip(found[key], expected[key], strict=True):
        for weights, layer in zip(step, wanted, strict=True):
            torch.testing.assert_close(weights[0], layer[0])
    if family.name == "t5":
        huggingface.register(structured_bias=True)
        assert torch.equal(generated(model, **given).sequences, expected.sequences)


def test_weights_of_generated_tokens_keep_no_keys_alive() -> None:
    family = FAMILIES["mistral"]
    model = family.build(torch.float64, "zeta")
    prompt, *steps = generated(model, family, "left").attentions
    # Of the prompt they are more numbers than its keys.
    assert all(isinstance(weights, zeta.LazyWeights) for weights in prompt)
    assert not any(isinstance(weights, zeta.LazyWeights) for step in steps for weights in step)
    with torch.no_grad():
        cache = model(**family.prompt("left", torch.float64)).past_key_values
        # Nobody asks for them: they are not computed.
        with_hook: list[Any] = []
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda *all_of: with_hook.append(all_of[-1][1]))
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    assert with_hook
    assert not any(weights.materialized for weights in with_hook)


def test_beams_equal_eager() -> None:
    for family in (FAMILIES["t5"], FAMILIES["mistral"]):
        model = family.build(torch.float64, "eager")
        expected = generated(model, family, "left", num_beams=3)
        model.set_attn_implementation("zeta")
        found = generated(model, family, "left", num_beams=3)
        assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["mistral", "t5"])
def test_a_cache_filled_in_chunks_gives_the_whole(name: str, static: bool) -> None:
    huggingface.register(structured_bias=True)
    family = FAMILIES[name]
    model = family.build(torch.float64, "zeta")
    given = family.inputs(None, torch.float64)
    ids = given.pop("decoder_input_ids" if name == "t5" else "input_ids")
    cache: Any = transformers.DynamicCache(config=model.config)
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    if name == "t5":
        given = {"encoder_outputs": model.encoder(input_ids=given["input_ids"])}
        cross = transformers.DynamicCache(config=model.config)
        cache = transformers.EncoderDecoderCache(cache, cross)
    argument = "decoder_input_ids" if name == "t5" else "input_ids"
    whole = model(**given, **{argument: ids}).logits
    chunks = ids.split([5, 1, 9, 8], 1)
    found = [model(**given, **{argument: ids}, past_key_values=cache).logits for ids in chunks]
    torch.testing.assert_close(torch.cat(found, 1), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "mistral", "gpt2"])
def test_a_compiled_model_is_one_graph(name: str) -> None:
    huggingface.register(structured_bias=True)
    family = FAMILIES[name]
    model = family.build(torch.float64, "zeta")
    given = family.inputs("right", torch.float64) | {"use_cache": False}
    expected = valid(family, given, model(**given))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(valid(family, given, compiled(**given)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
def test_a_compiled_forward_generates_over_a_static_cache(name: str) -> None:
    """Transformers makes the mask of the prompt outside of it, and hands it in."""
    torch.compiler.reset()
    family = FAMILIES[name]
    models = [family.build(torch.float32, kind) for kind in ("eager", "zeta")]
    models[1].forward = torch.compile(models[1].forward, backend="aot_eager", fullgraph=True)
    for hidden in (9, 0, 4):
        given = family.prompt("left", torch.float32)
        given["attention_mask"][1] = torch.arange(given["input_ids"].shape[1]) >= hidden
        options = {"max_new_tokens": 4, "max_length": None, "do_sample": False}
        options |= {"cache_implementation": "static", "disable_compile": True}
        expected, found = (model.generate(**given, **options) for model in models)
        assert torch.equal(found, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("structured", [False, True])
def test_multilingual_t5_equals_eager(structured: bool) -> None:
    huggingface.register(structured_bias=structured)
    t5 = FAMILIES["t5"]
    config = transformers.MT5Config(**t5.config().to_diff_dict() | {"dropout_rate": 0.0})
    family = Family("mt5", lambda: config, "MT5ForConditionalGeneration", "seq2seq")
    given = family.inputs("right", torch.float64)
    expected = results(family, family.build(torch.float64, "eager"), given)
    found = results(family, family.build(torch.float64, "zeta"), given)
    assert_within_bound(found, expected, expected, rounding=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_activation_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    huggingface.register(structured_bias=True)
    family = FAMILIES[name]
    model = family.build(torch.float64, "zeta").train()
    given = family.inputs("right", torch.float64)
    expected = results(family, model, given)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_within_bound(results(family, model, given), expected, expected)


def test_packed_sequences_stay_apart() -> None:
    family = FAMILIES["mistral"]
    ids = family.inputs(None, torch.float64)["input_ids"]
    positions = torch.cat((torch.arange(9), torch.arange(14))).expand(2, -1)
    given = {"input_ids": ids, "position_ids": positions}
    model = family.build(torch.float64, "eager")
    with softmax_in_float64(pytest.MonkeyPatch()):
        expected = results(family, model, given)
    model.set_attn_implementation("zeta")
    assert_within_bound(results(family, model, given), expected, expected, rounding=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_of_ones_own_is_taken_as_it_is(dtype: torch.dtype) -> None:
    family = FAMILIES["llama"]
    ids = family.inputs(None, torch.float64)["input_ids"]
    seen = torch.rand(2, 1, 23, 23) < 0.5
    seen |= torch.eye(23, dtype=torch.bool)
    least = torch.finfo(torch.float64).min
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, least)
    model = family.build(torch.float64, "eager")
    with softmax_in_float64(pytest.MonkeyPatch()):
        expected = model(input_ids=ids, attention_mask=added).logits
    model.set_attn_implementation("zeta")
    found = model(input_ids=ids, attention_mask=seen if dtype == torch.bool else added).logits
    torch.testing.assert_close(found, expected)


def test_dropout_follows_the_seed() -> None:
    family = FAMILIES["bert"]
    model = family.build(torch.float32, "zeta", attention_probs_dropout_prob=0.4).train()
    given = family.inputs("right", torch.float32)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**given).logits

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))
    assert torch.equal(model.eval()(**given).logits, run(3))


def test_dropout_leaves_the_mean() -> None:
    module = nn.Module()
    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
    call = functools.partial(attention, module, query, key, value, None, is_causal=False)
    samples = torch.stack([call(dropout=0.3)[0] for _ in range(300)])
    error = (samples.mean(0) - call()[0]).abs()
    assert samples.std(0).min() > 0
    assert (error < 5 * samples.std(0) / 300**0.5).all()


def largest_allocation(model: Any, given: dict[str, Tensor]) -> int:
    """Of a training step, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    from zeta.bench.memory import _allocations
    from zeta.ops.backends.chunked import passes

    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        model(**given).logits.float().square().mean().backward()
    tree = profiled.profiler.kineto_results.experimental_event_tree()
    # Beside memory that the backend allocates and frees untouched.
    return max(size for _, size in _allocations(tree) if size != passes._LARGEST_KEPT)


LENGTH = 2048


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("name", ["t5", "mistral", "bert"])
def test_training_makes_nothing_of_target_by_source(name: str) -> None:
    huggingface.register(structured_bias=True)
    family = FAMILIES[name]
    changes = {} if name == "t5" else {"max_position_embeddings": LENGTH}
    model = family.build(torch.float32, "zeta", **changes).train()
    given = {"input_ids": torch.ones(1, LENGTH, dtype=torch.int64)}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][:, -100:] = 0
    if name == "t5":
        given["decoder_input_ids"] = given["input_ids"]
    # Not even one of bool: a block of scores, of 2**20 numbers in float32, is as large as that.
    assert largest_allocation(model, given) <= LENGTH * LENGTH
    model.set_attn_implementation("eager")
    assert largest_allocation(model, given) > 4 * LENGTH * LENGTH


def test_registering_wraps_and_unwraps_t5_alone() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    plain = T5Attention.forward
    for _ in range(2):
        huggingface.register(structured_bias=True)
    assert T5Attention.forward is not plain
    assert T5Attention.forward.without_table is plain
    family = FAMILIES["t5"]
    expected = eager(family, None, torch.float64)
    model = family.build(torch.float64, "eager").train()
    with softmax_in_float64(pytest.MonkeyPatch()):
        found = results(family, model, family.inputs(None, torch.float64))
    assert_within_bound(found, expected, expected)
    huggingface.register()
    assert T5Attention.forward is plain


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_can_be_viewed_as_features(dtype: torch.dtype, tokens_first: bool) -> None:
    tensors = torch.randn(3, 2, 4, 5, 8, dtype=dtype).unbind()
    if tokens_first:
        tensors = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    out, _ = attention(nn.Identity(), *tensors, None)
    assert out.view(2, 5, 32).shape == (2, 5, 32)


def test_a_model_made_of_others_that_call_by_name_runs() -> None:
    text = transformers.GemmaConfig(**SIZES, **ENDS)
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=12, patch_size=6,
    )  # fmt: skip
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=32, image_token_id=60
    )
    kind = transformers.PaliGemmaForConditionalGeneration
    model = kind._from_config(config, attn_implementation="zeta").double().eval()
    ids = FAMILIES["llama"].inputs("left", torch.float64)
    ids["input_ids"] = ids["input_ids"].clamp(max=59)
    found = model(**ids).logits
    model.set_attn_implementation("eager")
    with softmax_in_float64(pytest.MonkeyPatch()):
        expected = model(**ids).logits
    seen = ids["attention_mask"].bool()
    torch.testing.assert_close(found[seen], expected[seen])


def test_the_families_of_these_tests_can_fail() -> None:
    family = FAMILIES["gpt_oss"]
    model = family.build(torch.float64, "zeta").train()
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks[0] += 1e-4
    expected = eager(family, None, torch.float64)
    found = results(family, model, family.inputs(None, torch.float64))
    with pytest.raises(AssertionError, match="output: rms error"):
        assert_within_bound(found, expected, expected)
