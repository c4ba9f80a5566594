"""Exact attention in plain torch, a block of rows at a time: every feature, any device, bounded
memory.

Nothing of the size target x source is ever held, unless it was given or is asked for. Blocks span
all keys their rows may see, so memory is that of the operands and of one block, which grows with
the source length alone. Gradients make the weights again.
"""

import dataclasses
from typing import cast

import torch
from torch import Tensor

from zeta.ops.backends.chunked import description, functions, operators
from zeta.ops.call import AttentionCall

NAME = "chunked"


def unsupported(call: AttentionCall) -> list[str]:
    """Why this backend cannot do a call; empty for every mask and bias of Zeta's own."""
    return description.unsupported(call)


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, differentiable once.

    Returns:
        ``(B, H, T, Dv)`` in the query's dtype and ``(B, H, T)`` in the wide dtype.
    """
    plan, biases = description.Plan.of(call)
    operands = (call.query, call.key, call.value)
    if torch.compiler.is_compiling():
        others, spec = plan.pack()
        found = operators.attention(*operands, biases, others, spec, call.scale, call.dropout_p)
    else:
        found = functions.Attention.apply(plan, *operands, *biases)
    return found[0], found[1]


def weights(call: AttentionCall) -> Tensor:
    """Weights after the softmax, before dropout.

    Returns:
        ``(B, H, T, S)``, or ``(B, T, S)`` averaged over heads, in the query's dtype.
    """
    mean = call.result == "mean_weights"
    plan, biases = description.Plan.of(dataclasses.replace(call, dropout_p=0.0))
    operands = (call.query, call.key)
    if torch.compiler.is_compiling():
        others, spec = plan.pack()
        packed = operators.weights(*operands, biases, others, spec, call.scale, mean)
        return cast(Tensor, packed[0])
    found = functions.Weights.apply(plan, mean, *operands, *biases)
    return cast(Tensor, found[0])
