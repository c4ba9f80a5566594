"""GPU kernels in Triton: every feature of the op, in memory linear in the sequence length.

Learned offset biases are read as a vector per head and get their gradient from the band of keys
within their reach; dense ones get theirs in their own shape. Sums are taken in a fixed order: two
runs give the same bits. Dropout draws what every backend of Zeta's draws. Weights are recomputed
from the log-sum-exp.

There are two sets: portable kernels, and those for Hopper (`hopper`), which serve what they take.

Triton compiles each kernel at its first launch. On CPU tensors the kernels run only in Triton's
interpreter, for tests: set ``TRITON_INTERPRET=1`` before the first call.
"""

import importlib.util
import os

import torch
from torch import Tensor

from zeta.ops.backends.triton.configs import SPLIT_ROWS, capability_of
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import lower, refusals
from zeta.ops.reading import NO_STORE, reasons_of_tensors, store_of
from zeta.stored import Pages
from zeta.transforms import constant_in_graphs, has_dispatch_modes, reasons_of_opaque

NAME = "triton"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)


def unsupported(call: AttentionCall) -> list[str]:
    """Why the kernels cannot do this call; empty if they can."""
    reasons = unsupported_device(call.query.device)
    if call.query.dtype not in DTYPES:
        reasons.append(f"it has no kernels for {call.query.dtype}")
    if max(call.head_dim, call.value.shape[-1]) > MAX_HEAD_DIM:
        reasons.append(
            f"its head_dim goes up to {MAX_HEAD_DIM}; got {call.head_dim} and "
            f"{call.value.shape[-1]}"
        )
    if call.query.device.type == "cpu" and call.query.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies no bfloat16")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        reasons.append("its kernels take tensors that torch.func does not wrap")
    return reasons + refusals(call) + reasons_of_opaque(call.tensors)


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention ``(B, H, T, Dv)`` and its log-sum-exp ``(B, H, T)`` in float32."""
    from zeta.ops.backends.triton import operators, passes
    from zeta.ops.backends.triton.arguments import Fixed

    lowered = lower(call)
    given = (call.query, call.key, call.value, lowered.offsets, lowered.dense)
    eager = _are_eager(given)
    if eager and not _need_gradient(given):
        out, lse, _ = passes.forward(*given, Fixed(*lowered.fixed()))
    else:
        run_one = operators.EagerAttention.apply if eager else operators.attention
        out, lse, *_ = run_one(*given, *lowered.fixed())
    return out, lse


def _are_eager(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether kernels may be launched on the spot."""
    from zeta.ops.backends.triton.operators import is_eager

    eager = all(is_eager(tensor) for tensor in tensors if tensor is not None)
    return eager and not has_dispatch_modes()


def _need_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def unreadable(call: AttentionCall) -> list[str]:
    """Why keys and values cannot be read where a cache keeps them; empty if they can."""
    store = store_of(call)
    if store is None:
        return [NO_STORE]
    reasons = unsupported(call) + reasons_of_tensors(call, store, SPLIT_ROWS)
    if not isinstance(store, Pages):
        reasons.append("it reads no codes")
    return reasons


def run_stored(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`run` over the pages of a cache.

    Raises:
        RuntimeError: What is stored was written over.
    """
    from zeta.ops.backends.triton import stored

    return stored.run(call)


def weights(call: AttentionCall) -> Tensor:
    """Weights before dropout: ``(B, H, T, S)``, or ``(B, T, S)`` averaged over heads."""
    from zeta.ops.backends.triton import operators, passes
    from zeta.ops.backends.triton.arguments import Fixed

    lowered = lower(call)
    given = (call.query, call.key, lowered.offsets, lowered.dense)
    mean = call.result == "mean_weights"
    made: tuple[Tensor, Tensor]
    if _are_eager(given) and not _need_gradient(given):
        fixed = Fixed(*lowered._replace(dropout_p=0.0).fixed())
        made = passes.weights(*given, mean, fixed)
    else:
        made = operators.weights(*given, mean, *lowered.fixed())
    return made[0]


def unsupported_device(device: torch.device) -> list[str]:
    """Why no kernel runs on a device; empty if they do."""
    if not _is_installed():
        return ["Triton is not installed"]
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return []
        return ["it needs a CUDA device"]
    if device.type != "cuda" or torch.version.hip is not None:
        return [f"it needs a CUDA device of NVIDIA; got {device}"]
    capability = capability_of(device)
    if capability < MIN_CAPABILITY:
        return [f"it needs compute capability 8.0 or more; {device} has {capability}"]
    return []


@constant_in_graphs
def _is_installed() -> bool:
    # Torch 2.11 cannot look into it.
    return importlib.util.find_spec("triton") is not None
