"""How the attentions of Transformers are run: their arguments and results, which change by version.

Each takes hidden states, one additive mask ``(B, 1, T, S)``, and what its model computes for it.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zeta.convert.source import Example, Runner, optional

INSTALL = "'zeta-attention[transformers]'"
NOT_COMPARED = {
    "queries whose keys are all hidden": "Transformers averages all values or gives NaN, Zeta 0",
}
_NO_LAYER = {"decoding": "the module has no layer_idx, by which caches of Transformers know it"}

Extra = Callable[[Any, Tensor, int], dict[str, Any]]
"""From the module, its input and the first position to further arguments."""


def run_with(
    *,
    mask: str | None,
    memory: str | None,
    extra: Extra = lambda module, x, first: {},
    outer: Callable[[Any], Callable[[Tensor], Tensor]] | None = None,
    inner: Callable[[Any], nn.Module] = lambda module: module,
    memory_mask: str | None = None,
    cached: Callable[[Any], bool] = lambda module: False,
    cached_memory: Callable[[Any], bool] = lambda module: False,
    window: Callable[[Any], int | None] = lambda module: None,
    prepare: Callable[[Any], None] = lambda module: None,
) -> Callable[[nn.Module], Runner]:
    """A `Source.runner` for a module of Transformers.

    Args:
        mask: The argument for the mask.
        memory: The argument for an encoder's hidden states; None: self-attention only.
        extra: Further arguments.
        inner: The part of the module that attends; all of it by default.
        outer: What its output goes through.
        memory_mask: The argument for the mask in cross-attention; the same by default.
        cached: Whether a module takes a cache of its own keys.
        cached_memory: Whether it takes one of an encoder's.
        window: A module's window, which its model puts in the mask.
        prepare: Readies a module for float64.
    """

    def runner(module: Any) -> Runner:
        use_eager(module)
        prepare(module)
        attend = inner(module)
        finish = nn.Identity() if outer is None else outer(module)

        def forward(x: Tensor, source: Tensor, added: Tensor | None, **more: Any) -> Any:
            arguments = {**extra(module, x, 0), **more}
            cross = source is not x
            if cross:
                assert memory is not None
                arguments[memory] = source
            if mask is not None:
                arguments[memory_mask if cross and memory_mask else mask] = added
            out, *rest = attend(x, **arguments)
            return finish(out), rest[-1]

        def call(example: Example) -> tuple[Tensor, Tensor | None]:
            added = example.additive(with_padding=True)
            out, weights = forward(example.query, example.key, added)
            return out, None if weights is None else weights.transpose(0, 1)

        def decode(x: Tensor) -> Tensor:
            cache = optional("transformers", INSTALL).DynamicCache()
            steps = []
            for position, token in enumerate(x.split(1, dim=1)):
                more = {**extra(module, token, position), "past_key_values": cache}
                added = _past(window(module), position, token)
                steps.append(forward(token, token, added, **more)[0])
            return torch.cat(steps, dim=1)

        def decode_cross(x: Tensor, source: Tensor) -> Tensor:
            library = optional("transformers", INSTALL)
            cache = library.EncoderDecoderCache(library.DynamicCache(), library.DynamicCache())
            steps = [
                forward(token, source, None, past_key_values=cache)[0]
                for token in x.split(1, dim=1)
            ]
            return torch.cat(steps, dim=1)

        caches = cached(module), cached_memory(module)
        if any(caches) and attend.layer_idx is None:
            return Runner(call, not_compared=_NO_LAYER)
        return Runner(call, decode if caches[0] else None, decode_cross if caches[1] else None)

    return runner


def _past(window: int | None, position: int, x: Tensor) -> Tensor | None:
    """What hides from one token those before its window, ``(1, 1, 1, position + 1)``."""
    if window is None:
        return None
    added = x.new_zeros(1, 1, 1, position + 1)
    added[..., : max(position + 1 - window, 0)] = float("-inf")
    return added


def use_eager(module: nn.Module) -> None:
    """Make a module compute its weights, which only Transformers' eager attention returns."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None:
            config._attn_implementation = "eager"


def config_class(model: str, name: str) -> Any:
    """A configuration class of a model, such as ``("t5", "T5Config")``."""
    return getattr(optional(f"transformers.models.{model}", INSTALL), name)


def attention_class(model: str, name: str) -> Any:
    """An attention class of a model, such as ``("t5", "T5Attention")``."""
    return getattr(optional(f"transformers.models.{model}.modeling_{model}", INSTALL), name)


def rotary_tables(module: Any, x: Tensor, first: int) -> dict[str, Any]:
    """The cosines and sines that a Llama's or Mistral's model hands to its attentions."""
    modeling = importlib.import_module(type(module).__module__)
    name = type(module).__name__.replace("Attention", "RotaryEmbedding")
    embedding = getattr(modeling, name)(module.config).to(x.device)
    positions = torch.arange(first, first + x.shape[1], device=x.device)[None]
    return {"position_embeddings": embedding(x, positions)}
