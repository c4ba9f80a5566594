"""Which models call their attention by name, so that an implementation is theirs to take."""

import sys
from typing import Any

import torch

_MIXED = frozenset({"BigBirdPegasusConfig", "GitConfig", "PPDocLayoutV2ReadingOrderConfig"})
"""Configurations of models that compute attention themselves in a file that also calls by name."""


def check_calls_by_name(config: Any) -> None:
    """Refuse a model that computes its attention by itself, and would misread Zeta's masks.

    Args:
        config: The model's.

    Raises:
        ValueError: It is of such a model.
    """
    kind = type(config)
    if _is_mixed(config) or not _calls_by_name(kind.__module__):
        raise ValueError(
            f"attn_implementation='zeta' cannot run the model of {kind.__name__}: it computes its "
            "attention itself instead of calling it by name; use attn_implementation='eager'"
        )


def joins_numbers(config: Any) -> bool:
    """Whether a model joins its mask to numbers of its own that are added to scores.

    DeepSeek-V4 does, by way of the mask's dtype: of bool, its 0 would be hidden and its -inf seen.
    Gemma 4's audio cuts the mask into blocks, and fills what is between them with the least number.
    """
    return type(config).__name__ in ("DeepseekV4Config", "Gemma4AudioConfig")


def _is_mixed(config: Any) -> bool:
    """Whether a model whose file calls some attention by name adds its own masks to other scores.

    Informer does, unless it is to go without what it is named for.
    """
    name = type(config).__name__
    return name in _MIXED or (name == "InformerConfig" and config.attention_type == "prob")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # so it is in torch
def _calls_by_name(configuration: str) -> bool:
    """Whether the file of a model does, of which this is the module of its configuration.

    It has the table of implementations, or a class that says that its parts have. Of a model whose
    file is not where Transformers would have it, nothing is known.
    """
    modeling = sys.modules.get(configuration.replace("configuration_", "modeling_"))
    if modeling is None or "configuration_" not in configuration:
        return True
    names = vars(modeling)
    return "ALL_ATTENTION_FUNCTIONS" in names or any(
        getattr(value, "_supports_attention_backend", False) is True for value in names.values()
    )
