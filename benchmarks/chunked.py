"""The chunked backend against torch doing the same work, forward and backward, on the CPU in
float32.

Usage: ``python -m benchmarks.chunked [--quick] [--out FILE]``. Results are compared first:
gradients too, but under dropout, where the two draw different masks, only without it. Times are
interleaved in one process.

Peers: `F.scaled_dot_product_attention`; for a learned bias once with a dense ``(1, H, T, T)`` leaf,
whose gradient is left in that shape, and once with the leaf being the table of T5, gathered in
every call, as a model does it; for weights, what `nn.MultiheadAttention` does: bmm, softmax, bmm,
mean. Ratios are peer / ours.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from benchmarks.checking import relative_error
from zeta import attention, attention_weights, biases, masks
from zeta.bench import peak_bytes, time_interleaved
from zeta.positions import t5_buckets

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 16, 2048, 64), (8, 8, 512, 64))
WEIGHTS_SHAPE: Shape = (2, 16, 2048, 64)
QUICK_SHAPES: tuple[Shape, ...] = ((1, 4, 256, 64),)
CLOSE = 1e-4
"""How far the two may be apart, as a root mean square, relative to that of the result."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two ways of the same work; each returns its results and gradients."""

    name: str
    shape: Shape
    ours: Callable[[], list[Tensor]]
    peer: Callable[[], list[Tensor]]
    same: bool = True


def comparisons(shape: Shape) -> list[Comparison]:
    """Training steps of one shape, ``(B, H, T, D)``."""
    _, heads, length, _ = shape
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    table = torch.randn(32, heads, requires_grad=True)
    incoming = torch.randn(shape)
    position = torch.arange(length)
    buckets = t5_buckets(position - position[:, None])
    dense = (
        F.embedding(buckets, table.detach())
        .permute(2, 0, 1)
        .unsqueeze(0)
        .contiguous()
        .requires_grad_()
    )
    hidden = torch.where(position <= position[:, None], 0.0, float("-inf"))

    def step(out: Tensor, *biases: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, (query, key, value, *biases), incoming)]

    def ours(
        bias: biases.Bias | None = None, dropout_p: float = 0.0, mask: masks.Mask | None = None
    ) -> Tensor:
        return attention(
            query, key, value, bias=bias, dropout_p=dropout_p, mask=mask, seed=1, backend="chunked"
        )

    def peer(bias: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout_p
        )

    def gathered() -> Tensor:
        return F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)

    def t5(**arguments: object) -> list[Tensor]:
        return step(ours(biases.Bucketed(table), **arguments), table)  # type: ignore[arg-type]

    causal = masks.Causal()
    return [
        Comparison(
            "T5 bias, peer's leaf dense", shape, t5, lambda: step(peer(dense), dense), same=False
        ),
        Comparison("T5 bias", shape, t5, lambda: step(peer(gathered()), table)),
        Comparison(
            "dropout 0.1",
            shape,
            lambda: step(ours(dropout_p=0.1)),
            lambda: step(peer(dropout_p=0.1)),
            same=False,
        ),
        Comparison("neither", shape, lambda: step(ours()), lambda: step(peer())),
        Comparison(
            "neither, backend auto",
            shape,
            lambda: step(attention(query, key, value)),
            lambda: step(peer()),
        ),
        Comparison(
            "causal, backend auto",
            shape,
            lambda: step(attention(query, key, value, mask=causal)),
            lambda: step(F.scaled_dot_product_attention(query, key, value, is_causal=True)),
        ),
        Comparison(
            "T5 bias, causal",
            shape,
            lambda: t5(mask=causal),
            lambda: step(peer(gathered() + hidden), table),
        ),
        Comparison(
            "T5 bias, causal, dropout 0.1",
            shape,
            lambda: t5(mask=causal, dropout_p=0.1),
            lambda: step(peer(gathered() + hidden, dropout_p=0.1), table),
            same=False,
        ),
    ]


def weights_comparison(shape: Shape) -> Comparison:
    """Output and weights averaged over heads, forward only."""
    batch, heads, length, head_dim = shape
    query, key, value = (torch.randn(shape) for _ in range(3))

    def ours() -> list[Tensor]:
        out = attention(query, key, value)
        return [out, attention_weights(query, key, reduce="mean", backend="chunked")]

    def peer() -> list[Tensor]:
        q, k, v = (x.reshape(batch * heads, length, head_dim) for x in (query, key, value))
        weights = torch.softmax(torch.bmm(q / math.sqrt(head_dim), k.mT), dim=-1)
        out = torch.bmm(weights, v).view(shape)
        return [out, weights.view(batch, heads, length, length).mean(1)]

    return Comparison("output and mean weights", shape, ours, peer)


def measure(comparison: Comparison, rounds: int) -> dict[str, object]:
    """Check, then time, then take the peak memory of each side once."""
    if comparison.same:
        for actual, expected in zip(comparison.ours(), comparison.peer(), strict=True):
            error = relative_error(actual, expected.detach().double())
            assert error <= CLOSE, f"{comparison.name}: the two differ by {error:.2g}"
    sides = {"ours": comparison.ours, "peer": comparison.peer}
    found = time_interleaved(sides, rounds=rounds, warmup=1)
    ours, peer = found["ours"], found["peer"]
    peaks = {f"{name} MiB": round(peak_bytes(side) / 2**20) for name, side in sides.items()}
    return {
        "work": comparison.name,
        "shape": list(comparison.shape),
        "ours ms": ours.median * 1e3,
        "peer ms": peer.median * 1e3,
        "ratio of medians": peer.median / ours.median,
        "ratio of bests": peer.best / ours.best,
        **peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, for tests")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each side (default: 9)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rounds = 2 if arguments.quick else arguments.rounds
    todo = [
        c for shape in (QUICK_SHAPES if arguments.quick else SHAPES) for c in comparisons(shape)
    ]
    todo.append(weights_comparison(QUICK_SHAPES[0] if arguments.quick else WEIGHTS_SHAPE))
    machine = report.describe_run()
    print(report.headline(machine))
    print(
        f"{'shape':18} {'work':30} {'ours ms':>8} {'peer ms':>8} {'median':>7} {'best':>6} "
        f"{'MiB ours, peer':>15}"
    )
    rows = []
    for comparison in todo:
        row = measure(comparison, rounds)
        rows.append(row)
        print(
            f"{comparison.shape!s:18} {comparison.name:30} {row['ours ms']:8.1f} "
            f"{row['peer ms']:8.1f} {row['ratio of medians']:7.2f} {row['ratio of bests']:6.2f} "
            f"{row['ours MiB']:8} {row['peer MiB']:6}",
            flush=True,
        )
        report.write({"machine": machine, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
