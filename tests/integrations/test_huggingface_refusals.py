"""Models, masks and arguments of Transformers that Zeta refuses, each by its name."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import masking_utils

import zeta
from tests.integrations.huggingface_families import FAMILIES
from zeta.integrations import huggingface
from zeta.integrations.huggingface.functions import attention, mask

pytestmark = pytest.mark.usefixtures("registered")


def test_an_absent_or_old_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    words = r"needs transformers 5\.23 or newer.*pip install 'zeta-attention\[transformers\]'"
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
        with pytest.raises(ImportError, match=r"and found 4\.57\.1") as caught:
            huggingface.register()
        assert caught.match(words)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=words):
        huggingface.register()


@pytest.mark.parametrize("name", ["cache", "indices", "block_indices", "sinks"])
def test_what_zeta_cannot_express_is_refused(name: str) -> None:
    query = torch.randn(1, 2, 3, 4)
    words = f"cannot do .* \\(the argument '{name}' of Module\\); use another attn_implementation"
    with pytest.raises(ValueError, match=words):
        attention(nn.Module(), query, query, query, None, **{name: object()})


def test_a_mask_of_three_dimensions_is_refused() -> None:
    model = FAMILIES["llama"].build(torch.float32, "zeta")
    words = r"attention_mask must be \(batch, length\).*got \(2, 5, 5\)"
    with pytest.raises(ValueError, match=words):
        model(input_ids=torch.ones(2, 5, dtype=torch.int64), attention_mask=torch.ones(2, 5, 5))


OWN_ATTENTION: dict[str, Callable[[], Any]] = {
    # They add masks, and fill where masks are True: both misread a mask of what is seen.
    "BloomForCausalLM": lambda: transformers.BloomConfig(
        vocab_size=61, hidden_size=32, n_layer=1, n_head=4
    ),
    "MptForCausalLM": lambda: transformers.MptConfig(
        vocab_size=61, d_model=32, n_layers=1, n_heads=4
    ),
    "RoFormerForMaskedLM": lambda: transformers.RoFormerConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    ),
    # It calls some of its attention by name.
    "BigBirdPegasusForConditionalGeneration": lambda: transformers.BigBirdPegasusConfig(
        vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_a_model_that_computes_its_attention_itself_is_refused(name: str) -> None:
    config = OWN_ATTENTION[name]()
    model = getattr(transformers, name)._from_config(config, attn_implementation="zeta").eval()
    given = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
    given["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    words = f"cannot run the model of {type(config).__name__}: it computes its attention itself"
    with pytest.raises(ValueError, match=words):
        model(**given)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="computes its attention itself"):
        torch.compile(model, backend="eager", fullgraph=True)(**given)


def test_git_is_refused_also_where_its_implementation_is_set_later() -> None:
    config = transformers.GitConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, vision_config={"num_hidden_layers": 1},
    )  # fmt: skip
    model = transformers.GitForCausalLM._from_config(config, attn_implementation="eager").eval()
    model.set_attn_implementation("zeta")
    with pytest.raises(ValueError, match="cannot run the model of GitConfig: it computes its"):
        model(input_ids=torch.ones(2, 5, dtype=torch.int64))


def test_the_reading_order_of_pp_doclayout_is_refused() -> None:
    from transformers.models.pp_doclayout_v2 import configuration_pp_doclayout_v2 as configurations

    config = configurations.PPDocLayoutV2ReadingOrderConfig()
    with pytest.raises(ValueError, match="cannot run the model of PPDocLayoutV2ReadingOrderConfig"):
        mask(1, 4, 4, config=config)


def test_informer_is_refused_with_its_own_attention_alone() -> None:
    words = "cannot run the model of InformerConfig: it computes its attention itself"
    with pytest.raises(ValueError, match=words):
        mask(1, 4, 4, config=transformers.InformerConfig(prediction_length=4))
    own = transformers.InformerConfig(prediction_length=4, attention_type="full")
    assert mask(1, 4, 4, config=own) is not None


def test_a_mask_made_for_other_lengths_is_broadcast_or_does_not_fit() -> None:
    query, key = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 7, 4)
    made = functools.partial(mask, 2, mask_function=masking_utils.bidirectional_mask_function)
    one = made(1, 1, attention_mask=torch.tensor([[True], [False]]))
    out, _ = attention(nn.Identity(), query, key, key, one)
    plain = zeta.attention(query, key, key).transpose(1, 2)
    torch.testing.assert_close(out, torch.stack((plain[0], torch.zeros_like(plain[1]))))
    other = made(3, 5, attention_mask=torch.ones(2, 5, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match=r"must broadcast to .*7\); got \(2, 1, 3, 5\)"):
        attention(nn.Identity(), query, key, key, other)


def test_a_mask_that_hides_something_cannot_be_added_to_scores() -> None:
    scores = torch.randn(1, 2, 4, 4)
    hides = mask(1, 4, 4)
    assert hides is not None
    with pytest.raises(ValueError, match="adds its mask to scores that it has computed itself"):
        scores + hides
    with pytest.raises(ValueError, match="adds its mask to scores that it has computed itself"):
        scores.add_(hides)
    everything = mask(1, 4, 4, mask_function=masking_utils.bidirectional_mask_function)
    assert everything is not None
    torch.testing.assert_close(everything + scores, scores + 1.0)


def test_a_model_that_asks_nobody_for_a_mask_runs_without_zeta() -> None:
    """As the page says; if it comes to run on Zeta, or to a refusal, the page is wrong."""
    config = transformers.DebertaV2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.DebertaV2Model._from_config(config, attn_implementation="eager").eval()
    given = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
    given["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = model(**given).last_hidden_state
    model.set_attn_implementation("zeta")
    assert torch.equal(model(**given).last_hidden_state, expected)


OWN_TABLE: dict[str, Callable[[], Any]] = {
    "FalconForCausalLM": lambda: transformers.FalconConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    ),
    "GPTJForCausalLM": lambda: transformers.GPTJConfig(
        vocab_size=61, n_embd=32, n_layer=1, n_head=4, rotary_dim=4
    ),
}


@pytest.mark.parametrize("name", OWN_TABLE)
def test_a_model_with_a_table_of_its_own_is_refused_by_transformers(name: str) -> None:
    """As the page says; if it comes to run on Zeta, or to a clear refusal, the page is wrong."""
    kind = getattr(transformers, name)
    with pytest.raises(KeyError, match=r"^'zeta'$"):
        kind._from_config(OWN_TABLE[name](), attn_implementation="zeta")
    model = kind._from_config(OWN_TABLE[name](), attn_implementation="eager")
    model.set_attn_implementation("zeta")
    assert model.config._attn_implementation == "eager"
