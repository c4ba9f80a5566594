"""What the module's Python costs, beside the same work written by hand."""

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zeta.nn import MultiheadAttention

E, H, D = 512, 8, 64
ROUNDS, CALLS = 300, 10


@pytest.mark.serial
@pytest.mark.slow
def test_one_token_costs_little_more_than_by_hand() -> None:
    module = MultiheadAttention(None, E, H, self_attention=True).eval()
    q_proj, k_proj, v_proj, out_proj = module.q_proj, module.k_proj, module.v_proj, module.out_proj
    x = torch.randn(1, 1, E)

    def by_hand() -> Tensor:
        q, k, v = (p(x).view(1, 1, H, D).transpose(1, 2) for p in (q_proj, k_proj, v_proj))
        out = F.scaled_dot_product_attention(q, k, v)
        return out_proj(out.transpose(1, 2).reshape(1, 1, E))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            torch.testing.assert_close(module(x, x, x)[0], by_hand())
            ours, theirs = interleaved(lambda: module(x, x, x), by_hand)
    finally:
        torch.set_num_threads(threads)
    # Measured 1.25 on a processor with AVX-512 and 1.43 on an older one, where Python takes longer
    # beside the same products.
    most = 1.3 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1.5
    assert ours <= most * theirs, f"{ours * 1e6:.1f} us, by hand {theirs * 1e6:.1f} us"


def interleaved(*functions: Callable[[], object]) -> list[float]:
    """The shortest time of a call of each, in seconds of this thread's own."""
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for i, function in enumerate(functions):
            start = time.thread_time()
            for _ in range(CALLS):
                function()
            best[i] = min(best[i], (time.thread_time() - start) / CALLS)
    return best
