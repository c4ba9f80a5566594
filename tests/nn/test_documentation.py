"""The three usage examples of the documentation, run as they are printed."""

import argparse
import dataclasses
import types
from typing import Any

import pytest
import torch

from zeta.nn import MultiheadAttention

BASIC = """
import torch

from zeta.nn import MultiheadAttention

args = ...  # Some configuration
attention = MultiheadAttention(
    args, embed_dim=512, num_heads=8, dropout=0.1, self_attention=True
)
query = torch.rand((32, 10, 512))
key = torch.rand((32, 10, 512))
value = torch.rand((32, 10, 512))

attn, attn_weights = attention(query, key, value)
"""

MASKED = """
import torch

from zeta.nn import MultiheadAttention

args = ...  # Some configuration
attention = MultiheadAttention(
    args, embed_dim=512, num_heads=8, dropout=0.1, self_attention=True
)
query = torch.rand((32, 10, 512))
key = torch.rand((32, 10, 512))
value = torch.rand((32, 10, 512))
attn_mask = torch.ones((10, 10)).triu_() * -1e9  # Upper triangular mask

attn, attn_weights = attention(query, key, value, attn_mask=attn_mask)
"""

CROSS = """
import torch

from zeta.nn import MultiheadAttention

args = ...  # Some configuration
attention = MultiheadAttention(
    args, embed_dim=512, num_heads=8, dropout=0.1, encoder_decoder_attention=True
)
query = torch.rand((32, 10, 512))  # Decoder query
key = torch.rand((32, 20, 512))  # Encoder key
value = torch.rand((32, 20, 512))  # Encoder value

attn, attn_weights = attention(query, key, value)
"""

EXAMPLES = {"basic": (BASIC, 10), "masked": (MASKED, 10), "cross": (CROSS, 20)}


@dataclasses.dataclass
class ModelConfig:
    """A model's configuration, most of which is not about attention."""

    vocab_size: int = 32000
    xpos_rel_pos: bool = True
    dropout: float = 0.3


SIXTY_UNRELATED = types.SimpleNamespace(
    **{f"encoder_layer_{i}_setting": i for i in range(54)},
    encoder_embed_dim=768,
    encoder_attention_heads=12,
    rel_pos_buckets=32,
    max_rel_pos=128,
    layernorm_embedding=False,
    attention_dropout=0.1,
)

CONFIGURATIONS: dict[str, Any] = {
    "as printed": ...,
    "None": None,
    "empty": {},
    "mapping": {"layernorm_eps": 1e-5, "xpos_rel_pos": False},
    "mapping with xPos": {"xpos_rel_pos": True, "xpos_scale_base": 2, "layernorm_eps": 1e-5},
    "Namespace": argparse.Namespace(multiway=False, layernorm_eps=1e-5, flash_attention=True),
    "dataclass": ModelConfig(),
    "object": SIXTY_UNRELATED,
    "multiway": {"multiway": True},
}


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("args", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_example_runs_as_printed(example: str, args: Any) -> None:
    code, source = EXAMPLES[example]
    names: dict[str, Any] = {"configuration": args}
    exec(code.replace("args = ...", "args = configuration"), names)
    assert names["attn"].shape == (32, 10, 512)
    assert names["attn"].isfinite().all()
    assert names["attn_weights"].shape == (8, 32, 10, source)
    assert torch.allclose(names["attn_weights"].sum(-1), torch.ones(8, 32, 10), atol=1e-5)


def test_example_mask_is_added_as_it_is_written() -> None:
    """It hides each token from itself as well, and leaves the first one nothing: all keys alike."""
    names: dict[str, Any] = {}
    exec(MASKED.replace("args = ...", "args = None"), names)
    weights = names["attn_weights"]
    assert torch.allclose(weights[:, :, 0], torch.full((8, 32, 10), 0.1), atol=1e-6)
    assert not weights[:, :, 1:].triu(1).any()


def test_parameters_and_defaults_are_the_documented_ones() -> None:
    attention = MultiheadAttention(None, 64, 4, self_attention=True, subln=True)
    assert set(attention.state_dict()) == {
        *(f"{p}_proj.{t}" for p in ("q", "k", "v", "out") for t in ("weight", "bias")),
        "inner_attn_ln.weight",
        "inner_attn_ln.bias",
    }
    assert attention.dropout == 0.0
    assert sum(p.numel() for p in attention.parameters()) == 4 * (64 * 64 + 64) + 2 * 64


def test_state_dict_keys_of_xpos_and_multiway_are_torchscales() -> None:
    args = {"multiway": True, "xpos_rel_pos": True}
    keys = set(MultiheadAttention(args, 32, 4, self_attention=True, subln=True).state_dict())
    assert keys == {
        "xpos.scale",
        *(
            f"{part}.{way}.{kind}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj", "inner_attn_ln")
            for way in "AB"
            for kind in ("weight", "bias")
        ),
    }
