"""Masks of Transformers' models on Zeta."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import masking_utils

import zeta
from tests.integrations.huggingface_families import (
    ENDS,
    FAMILIES,
    SIZES,
    Family,
    softmax_in_float64,
    valid,
)
from zeta.integrations.huggingface import functions
from zeta.integrations.huggingface.functions import attention, mask
from zeta.integrations.huggingface.standin import MaskStandIn

pytestmark = pytest.mark.usefixtures("registered")


def test_the_mask_of_a_model_is_a_pattern_until_it_is_read() -> None:
    family = FAMILIES["mistral"]
    model = family.build(torch.float32, "zeta")
    given = family.inputs("right", torch.float32)
    seen: list[Tensor] = []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**given)
    (mask,) = seen
    assert isinstance(mask, MaskStandIn)
    assert mask._made is None
    assert mask.contiguous() is mask
    assert isinstance(mask.detach(), MaskStandIn)
    window = zeta.masks.SlidingWindow(7) & zeta.masks.Padding(torch.tensor([23, 14]))
    assert torch.equal(mask & True, window.dense(2, 1, 23, 23))
    assert mask._made is not None


@pytest.mark.parametrize("hidden", [0, 9])
def test_a_mask_that_a_model_joins_to_numbers_is_made_of_numbers(hidden: int) -> None:
    config = transformers.DeepseekV4Config(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        moe_intermediate_size=24, q_lora_rank=16, o_groups=2, o_lora_rank=16, n_routed_experts=4,
        num_experts_per_tok=4, sliding_window=5, index_n_heads=2, index_head_dim=16, index_topk=4,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        mlp_layer_types=["moe", "moe"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    family = Family("deepseek_v4", lambda: config, "DeepseekV4ForCausalLM", "decoder")
    model = family.build(torch.float32, "eager")
    ids = family.inputs(None, torch.float32)["input_ids"]
    seen = (torch.arange(23) >= torch.tensor([[0], [hidden]])).long()
    expected = model(input_ids=ids, attention_mask=seen).logits[seen.bool()]
    model.set_attn_implementation("zeta")
    found = model(input_ids=ids, attention_mask=seen).logits[seen.bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_mask_that_a_model_cuts_into_blocks_of_numbers_is_made_of_numbers() -> None:
    config = transformers.Gemma4AudioConfig(num_hidden_layers=1)
    model = transformers.Gemma4AudioModel._from_config(config, attn_implementation="eager").eval()
    given = torch.randn(2, 64, 128), torch.arange(64) < torch.tensor([[64], [40]])
    found = []
    for implementation in ("eager", "zeta"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found.append(model(*given).last_hidden_state)
    torch.testing.assert_close(found[1], found[0])


def test_a_model_may_make_a_mask_of_no_window() -> None:
    """Qwen2-MoE makes one of each kind, also for no layer: of size 0 where none has a window."""
    config = transformers.Qwen2MoeConfig(
        **SIZES, **ENDS, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        num_experts=4, num_experts_per_tok=4,
    )  # fmt: skip
    assert config.sliding_window == 0
    family = Family("qwen2_moe", lambda: config, "Qwen2MoeForCausalLM", "decoder")
    given = family.inputs("left", torch.float32)
    expected = valid(family, given, family.build(torch.float32, "eager")(**given))
    found = valid(family, given, family.build(torch.float32, "zeta")(**given))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_a_mask_that_is_written_to_is_what_was_written(static: bool) -> None:
    family = FAMILIES["mistral"]
    given = family.inputs(None, torch.float64)
    found = []
    for implementation, hides in (("eager", torch.finfo(torch.float64).min), ("zeta", False)):
        model = family.build(torch.float64, implementation)

        def hide(module: nn.Module, args: Any, kwargs: Any, hides: Any = hides) -> None:
            kwargs["attention_mask"][..., 5:, 2] = hides

        model.model.layers[0].register_forward_pre_hook(hide, with_kwargs=True)
        cache = transformers.StaticCache(config=model.config, max_cache_len=40) if static else None
        with softmax_in_float64(pytest.MonkeyPatch()):
            found.append(model(**given, past_key_values=cache).logits)
    torch.testing.assert_close(found[1], found[0])


def test_a_mask_that_was_written_to_is_detached_as_it_is() -> None:
    made = mask(1, 4, 4)
    assert isinstance(made, MaskStandIn)
    made[..., 3, 0] = False
    query = torch.randn(1, 2, 4, 8)
    expected, _ = attention(nn.Identity(), query, query, query, made.clone())
    for same in (made, made.detach()):
        torch.testing.assert_close(attention(nn.Identity(), query, query, query, same)[0], expected)
    assert not torch.allclose(
        attention(nn.Identity(), query, query, query, mask(1, 4, 4))[0], expected
    )


class Says(nn.Module):
    """An attention that says whether it is causal, or does not."""

    def __init__(self, is_causal: bool | None) -> None:
        super().__init__()
        if is_causal is not None:
            self.is_causal = is_causal


@pytest.mark.parametrize("says", [None, False, True])
def test_without_a_mask_only_what_says_so_is_causal(says: bool | None) -> None:
    query = torch.randn(1, 2, 4, 8)
    found, _ = attention(Says(says), query, query, query, None)
    expected = zeta.attention(query, query, query, mask=zeta.masks.Causal() if says else None)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_a_cross_attention_that_does_not_say_and_gets_no_mask_sees_everything() -> None:
    from transformers.models.mllama import modeling_mllama as mllama

    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2
    )
    module = mllama.MllamaTextCrossAttention(config, layer_idx=0).eval()
    states, images = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    found = []
    for implementation in ("eager", "zeta"):
        config._attn_implementation = implementation
        found.append(module(states, images)[0])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ["causal_mask_function", "bidirectional_mask_function"])
def test_no_mask_is_left_out_where_a_compiler_traces(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None means none: who asked for a causal mask need not say so again."""
    monkeypatch.setattr(functions, "is_traced", lambda: True)
    skips = {"allow_is_causal_skip": True, "allow_is_bidirectional_skip": True}
    found = mask(1, 4, 4, mask_function=getattr(masking_utils, name), **skips)
    expected = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert torch.equal(found, expected.tril() if "bi" not in name else expected)


@pytest.mark.parametrize("masked", [False, True])
def test_queries_that_all_sequences_share_are_broadcast(masked: bool) -> None:
    """As those of BLIP-2's Q-Former."""
    query, key = torch.randn(1, 2, 3, 8), torch.randn(2, 2, 7, 8)
    seen = torch.arange(7) < torch.tensor([7, 4])[:, None, None, None]
    found, weights = attention(nn.Identity(), query, key, key, seen if masked else None)
    expected = zeta.attention(
        query.expand(2, -1, -1, -1), key, key, mask=zeta.masks.keep(seen) if masked else None
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert weights is not None
    assert weights.shape == (2, 2, 3, 7)


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_ones_own_is_broadcast(dtype: torch.dtype, dims: int) -> None:
    query, key = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 7, 8)
    given = (torch.rand(3, 2, 5, 7) < 0.6)[(0,) * (4 - dims)]
    if dtype.is_floating_point:
        given = torch.randn(given.shape)
    found, _ = attention(nn.Identity(), query, key, key, given)
    expected = F.scaled_dot_product_attention(query, key, key, attn_mask=given)
    seen = torch.isfinite(expected)
    torch.testing.assert_close(found.transpose(1, 2)[seen], expected[seen])


def test_an_unknown_mask_function_is_made_dense() -> None:
    from transformers.masking_utils import create_bidirectional_sliding_window_mask as create

    config = FAMILIES["mistral"].config()
    given = {"inputs_embeds": torch.zeros(2, 12, 32), "attention_mask": None}
    config._attn_implementation = "sdpa"
    expected = create(config, **given)
    config._attn_implementation = "zeta"
    found = create(config, **given)
    assert not isinstance(found, MaskStandIn)
    assert torch.equal(found, expected)
