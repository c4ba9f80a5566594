"""The native CPU kernel: C++ with AVX2, AVX-512 (BF16) or AMX, reached through a plain C library.

Nothing of the size target x source is ever held, unless it was given or is asked for. A relative
bias is read as a vector per head; masks skip what they hide; dropout draws what every backend of
Zeta's draws. The library is built when Zeta is installed, where there is a C++ compiler, and loaded
at the first call.
"""

import torch
from torch import Tensor

from zeta.ops.backends.cpu import functions, library, passes
from zeta.ops.backends.cpu.description import DTYPES, MAX_HEAD_DIM, Fixed
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import lower, refusals
from zeta.ops.precision import float32_precision
from zeta.standin import PLAIN
from zeta.transforms import has_dispatch_modes, reasons_of_opaque

NAME = "cpu"


def unsupported(call: AttentionCall) -> list[str]:
    """Why the kernel cannot do this call; empty if it can."""
    query = call.query
    if query.device.type != "cpu":
        return [f"it computes on the CPU; got tensors on {query.device}"]
    reasons = []
    obstacle = library.obstacle()
    if obstacle is not None:
        reasons.append(obstacle)
    if query.dtype not in DTYPES:
        reasons.append(f"it has no kernels for {query.dtype}")
    if max(query.shape[-1], call.value.shape[-1]) > MAX_HEAD_DIM:
        reasons.append(
            f"its head_dim goes up to {MAX_HEAD_DIM}; got {query.shape[-1]} and "
            f"{call.value.shape[-1]}"
        )
    if _is_wrapping() and not torch.compiler.is_compiling() and not _is_eager(query):
        reasons.append("torch.func, where a mode traces it, sees torch's own operators only")
    return reasons + refusals(call) + reasons_of_opaque(call.tensors)


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Attention ``(B, H, T, Dv)`` and its log-sum-exp ``(B, H, T)`` in float32; a step of
    decoding that does not ask for it gets None.
    """
    lowered = lower(call)
    operands = (call.query, call.key, call.value, lowered.offsets, lowered.dense)
    fixed = (*lowered.fixed(), _is_high(call))
    if not _are_eager(operands):
        from zeta.ops.backends.cpu import operators

        out, lse = operators.attention(*operands, *fixed)
        return out, lse
    if not _is_learned(operands) and not _is_wrapping():
        if call.result == "output" and passes.is_step(call.query, call.key):
            return passes.step(*operands, Fixed(*fixed)), None
        return passes.forward(*operands, Fixed(*fixed))
    found: tuple[Tensor, Tensor] = functions.Attention.apply(*operands, Fixed(*fixed))
    return found


def unreadable(call: AttentionCall) -> list[str]:
    """Why keys and values cannot be read where a cache keeps them; empty if they can."""
    from zeta.ops.backends.cpu import stored

    return stored.unreadable(call)


def run_stored(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`run` over what a cache keeps."""
    from zeta.ops.backends.cpu import stored

    return stored.run(call)


def weights(call: AttentionCall) -> Tensor:
    """Weights before dropout: ``(B, H, T, S)``, or ``(B, T, S)`` averaged over heads."""
    lowered = lower(call)
    operands = (call.query, call.key, lowered.offsets, lowered.dense)
    mean = call.result == "mean_weights"
    fixed = (*lowered.fixed(), _is_high(call))
    found: Tensor
    if not _are_eager(operands):
        from zeta.ops.backends.cpu import operators

        found, _ = operators.weights(*operands, mean, *fixed)
        return found
    if not _is_learned(operands) and not _is_wrapping():
        return passes.weights(*operands, mean, Fixed(*fixed))[0]
    found, _ = functions.Weights.apply(*operands, mean, Fixed(*fixed))
    return found


def run_with_weights(call: AttentionCall, mean: bool) -> tuple[Tensor, Tensor] | None:
    """The output and the weights in one pass; None where that takes two."""
    if call.dropout_p or not _is_eager(call.query) or _is_wrapping():
        return None
    lowered = lower(call)
    operands = (call.query, call.key, call.value, lowered.offsets, lowered.dense)
    if _is_learned(operands) or not _are_eager(operands):
        return None
    return passes.output_and_weights(*operands, mean, Fixed(*lowered.fixed(), _is_high(call)))


def _is_high(call: AttentionCall) -> bool:
    return call.query.dtype == torch.float32 and float32_precision(call.precision) == "high"


def _is_eager(tensor: Tensor) -> bool:
    """Whether nothing traces or watches what is computed: the library may run on the spot."""
    if torch.compiler.is_compiling() or has_dispatch_modes():
        return False
    return type(tensor) in PLAIN


def _are_eager(operands: tuple[Tensor | None, ...]) -> bool:
    assert operands[0] is not None
    return _is_eager(operands[0]) and all(
        tensor is None or type(tensor) in PLAIN for tensor in operands
    )


def _is_learned(operands: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in operands
    )


def _is_wrapping() -> bool:
    """Inside a transform of ``torch.func``, whose tensors have no address."""
    return torch._C._are_functorch_transforms_active()
