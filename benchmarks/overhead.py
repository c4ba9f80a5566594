"""The cost of Python: a forward of the module on one token against the same work written by hand.

Usage: ``python -m benchmarks.overhead [--out FILE]``. Batch 1, one token, embed 512, 8 heads,
float32, on the CPU. By hand means four `torch.nn.Linear` and `F.scaled_dot_product_attention`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import report
from zeta.bench import time_interleaved
from zeta.nn import MultiheadAttention

EMBED, HEADS = 512, 8


def by_hand(module: MultiheadAttention) -> Callable[[Tensor], Tensor]:
    """The module's work, without the module."""

    def run(x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).view(1, 1, HEADS, EMBED // HEADS).transpose(1, 2)
            for linear in (module.q_proj, module.k_proj, module.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        joined: Tensor = module.out_proj(out.transpose(1, 2).reshape(1, 1, EMBED))
        return joined

    return run


def measure(rounds: int = 200) -> dict[str, dict[str, float]]:
    """Seconds of both ways, and their ratio, with and without autograd."""
    module = MultiheadAttention(None, EMBED, HEADS, self_attention=True).eval()
    assert isinstance(module.q_proj, nn.Linear)
    x, hand = torch.randn(1, 1, EMBED), by_hand(module)
    rows = {}
    for name, grad in (("with autograd", True), ("without autograd", False)):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(module(x, x, x)[0], hand(x))
            found = time_interleaved(
                {"module": lambda: module(x, x, x), "by hand": lambda: hand(x)},
                rounds=rounds,
                warmup=20,
                calls=20,
            )
        ours, theirs = found["module"], found["by hand"]
        rows[name] = {
            "module": ours.median,
            "by hand": theirs.median,
            "ratio of medians": ours.median / theirs.median,
            "ratio of bests": ours.best / theirs.best,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    rows = measure()
    for name, row in rows.items():
        print(
            f"{name:18} module {row['module'] * 1e6:6.1f} us, "
            f"by hand {row['by hand'] * 1e6:6.1f} us, "
            f"ratio {row['ratio of medians']:.2f} (bests {row['ratio of bests']:.2f})"
        )
    report.write({"machine": report.describe_run(), "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
