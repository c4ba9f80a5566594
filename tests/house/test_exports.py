"""What users may import, pinned: a name added or lost here is a decision, not an accident."""

import importlib
import inspect
from types import ModuleType

import pytest

import zeta

PUBLIC = {
    "zeta": [
        "BackendUnsupported",
        "Explanation",
        "LazyWeights",
        "__version__",
        "attention",
        "attention_weights",
        "attention_with_lse",
        "beam_search",
        "biases",
        "caches",
        "explain",
        "generate",
        "generation",
        "masks",
        "nn",
        "set_float32_precision",
        "swap",
    ],
    "zeta.convert": [
        "Case",
        "ConversionError",
        "Converted",
        "Report",
        "check",
        "convert_state_dict",
        "from_module",
        "relative_position_bias",
        "to_module",
    ],
    "zeta.generation": [
        "Beams",
        "Draft",
        "Generated",
        "Greedy",
        "Model",
        "Sampling",
        "Step",
        "beam_search",
        "generate",
        "stream",
    ],
    "zeta.caches": [
        "Cache",
        "CacheFullError",
        "Cached",
        "CrossCache",
        "DecodingCache",
        "DictCache",
        "DynamicCache",
        "PagePool",
        "PagedCache",
        "QuantizedCache",
        "RollingCache",
        "StaticCache",
        "extend_padding",
    ],
    "zeta.nn": [
        "ALiBi",
        "AttentionConfig",
        "LinearScaling",
        "Llama3Scaling",
        "MultiheadAttention",
        "MultiwayEmbedding",
        "MultiwayNetwork",
        "MultiwayWrapper",
        "RelativePositionBias",
        "RotaryEmbedding",
        "XPOS",
        "XPos",
        "YarnScaling",
        "set_split_position",
    ],
}

# Modules without ``__all__``: what they define themselves.
DEFINED = {
    "zeta.biases": [
        "Additive",
        "Alibi",
        "Bias",
        "Bucketed",
        "Dense",
        "OffsetBias",
        "Softcap",
        "Sum",
        "summands",
    ],
    "zeta.masks": [
        "AllOf",
        "AnyOf",
        "Causal",
        "Dense",
        "Documents",
        "Mask",
        "Padding",
        "PrefixLM",
        "SlidingWindow",
        "conjuncts",
        "drop",
        "keep",
    ],
}


def defined(module: ModuleType) -> list[str]:
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_exports(name: str) -> None:
    assert sorted(importlib.import_module(name).__all__) == PUBLIC[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_export_is_there(name: str) -> None:
    module = importlib.import_module(name)
    assert [export for export in module.__all__ if not hasattr(module, export)] == []


@pytest.mark.parametrize("name", DEFINED)
def test_definitions(name: str) -> None:
    assert defined(importlib.import_module(name)) == DEFINED[name]


@pytest.mark.parametrize("name", [*PUBLIC, *DEFINED])
def test_everything_public_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    names = PUBLIC.get(name) or DEFINED[name]
    bare = [
        export
        for export in names
        if callable(getattr(module, export)) and not inspect.getdoc(getattr(module, export))
    ]
    assert bare == []


def signature(function: object) -> list[str]:
    """Parameter names in order; a ``*`` before those that are keyword-only."""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        found.append(parameter.name)
    return found


FIXED = {
    "nn.MultiheadAttention": """args embed_dim num_heads dropout self_attention
        encoder_decoder_attention subln * num_kv_heads head_dim kdim vdim bias scale qk_norm
        position window need_weights device dtype""",
    "nn.MultiheadAttention.forward": """self query key value incremental_state key_padding_mask
        attn_mask rel_pos is_first_step * is_causal need_weights positions split_position""",
    "nn.RelativePositionBias": "bidirectional num_buckets max_distance n_heads *",
    "nn.MultiwayWrapper": "args module dim",
    "attention": "query key value * mask bias dropout_p scale seed backend",
    "attention_with_lse": "query key value * mask bias dropout_p scale seed backend",
    "attention_weights": "query key * mask bias scale reduce",
    "explain": "query key value * mask bias dropout_p scale seed backend",
}


@pytest.mark.parametrize("name", FIXED)
def test_arguments_keep_their_names_and_order(name: str) -> None:
    found = zeta
    for part in name.split("."):
        found = getattr(found, part)
    actual, fixed = signature(found), FIXED[name].split()
    positional = fixed.index("*") if "*" in fixed else len(fixed)
    assert actual[:positional] == fixed[:positional]
    # Later keyword-only ones may be added.
    assert set(fixed) <= set(actual)
