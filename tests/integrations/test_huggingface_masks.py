"""Masks of Transformers' models on Zeta."""

import pytest
import torch
import transformers
from torch import Tensor

import zeta
from tests.integrations.huggingface_families import (
    ENDS,
    FAMILIES,
    SIZES,
    Family,
    valid,
)
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
