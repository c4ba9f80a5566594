"""How exactly float32 is multiplied where a processor multiplies matrices in bfloat16 alone (AMX).

A float32 number is the sum of three bfloat16 ones. ``"highest"`` keeps all three, at six products
for one, with errors as float32's own; ``"high"`` keeps two, at three products, with relative errors
of about 1e-5. Elsewhere float32 is multiplied as it is, whatever is said here.
"""

from typing import Literal

import torch

from zeta.transforms import constant_in_graphs, uncompiled

Precision = Literal["highest", "high"]

_chosen: Precision | None = None


def set_float32_precision(precision: Precision | None) -> None:
    """Choose how exactly attention multiplies float32 on processors with AMX.

    It holds for calls that do not say so themselves with ``precision=``. A compiled function keeps
    what torch said when it was compiled.

    Args:
        precision: ``"highest"``: errors as float32's own. ``"high"``: about 1e-5, in half the time.
            None, as at the start: follow what torch is told for the CPU, by
            ``torch.set_float32_matmul_precision`` (``"medium"`` is ``"high"``) or
            ``torch.backends.mkldnn.matmul.fp32_precision`` (``"tf32"`` and ``"bf16"`` are).

    Raises:
        ValueError: It is none of these.
    """
    check_precision(precision)
    global _chosen
    _chosen = precision


def float32_precision(precision: Precision | None = None) -> Precision:
    """What holds for a call that asks for ``precision``."""
    found = precision or _chosen
    if found is not None:
        return found
    return "high" if _of_torch() in ("tf32", "bf16") else "highest"


@constant_in_graphs
@uncompiled
def _of_torch() -> str:
    # torch.compile cannot look into it, be it called from a graph or between two.
    # `torch.get_float32_matmul_precision` fails where that of GPUs is another; what
    # `torch.backends.mkldnn.matmul` asks takes a tenth of the time of asking it.
    found: str = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
    return found


def check_precision(precision: object) -> None:
    """Raise ValueError unless it is a `Precision` or None."""
    if precision not in (None, "highest", "high"):
        raise ValueError(f"precision must be 'highest', 'high' or None; got {precision!r}")
