"""Decoding on the CPU: a step of the whole module, beside TorchScale's and beside torch's kernel.

Usage: ``python -m benchmarks.decoding [--quick] [--rounds N] [--out FILE] [--figure FILE]``; and
``--redraw FILE --figure FILE`` draws the figure of a results file again. TorchScale is no
requirement of the project: ``pip install --no-deps torchscale==0.3.0``.

One token a step, after so many cached tokens, which grow during the measurement alike for all:

- ``dict``: our module with a plain dict, against TorchScale's with its dict;
- ``static``: our module with a `StaticCache`, against the same projections by hand around
  preallocated keys and values and `F.scaled_dot_product_attention(enable_gqa=True)`.

A step of each is first compared with float64, and after the last they are compared again. Times
are interleaved in one process; ratios are peer / ours. The bandwidth of the attention alone counts
its keys and values once, that of the copy beside it what it reads and what it writes; a sum of as
many bytes only reads. Memory is the most that a generation holds, over its final cache.

Shapes: B batch, H heads, G key heads, L cached tokens, D head dimension, E embedding.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zeta
from benchmarks import report
from benchmarks.checking import PEER_FACTOR, relative_error
from benchmarks.cpu_modules import torchscale_components
from benchmarks.cpu_rows import BOUNDS, DTYPES
from zeta import plots
from zeta.bench import peak_bytes, time_interleaved
from zeta.caches import DynamicCache, StaticCache
from zeta.nn import MultiheadAttention

D = 64
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """What a step is measured with."""

    dtype: str
    batch: int
    heads: int
    key_heads: int
    length: int
    xpos: bool = False

    @property
    def embed_dim(self) -> int:
        return self.heads * D

    def described(self) -> Row:
        return dataclasses.asdict(self)


Step = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Ours and a peer, by name, each with a cache of its own filled with the same tokens, and a
    step in float64."""

    steps: dict[str, Step]
    oracle: Step

    def check(self, case: Case) -> None:
        """One step of each against the oracle's.

        Raises:
            AssertionError: One is too far off.
        """
        expected = self.oracle()
        for factor, (name, step) in zip((1, PEER_FACTOR), self.steps.items(), strict=True):
            self._expect(
                step(), expected, factor * 2 * BOUNDS[DTYPES[case.dtype]], f"{case}, {name}"
            )

    def check_again(self, case: Case) -> None:
        """One more step of each, which by now have seen as many tokens, against each other.

        Raises:
            AssertionError: They are too far apart.
        """
        ours, peer = (step() for step in self.steps.values())
        self._expect(ours, peer.double(), PEER_FACTOR * 2 * BOUNDS[DTYPES[case.dtype]], f"{case}")

    @staticmethod
    def _expect(actual: Tensor, expected: Tensor, bound: float, what: str) -> None:
        error = relative_error(actual, expected)
        assert error <= bound, f"{what}: error {error:.2g} exceeds {bound:.2g}"


def pairs_of(case: Case, room: int) -> Iterator[Pair]:
    """With dicts, against TorchScale, where key heads are not grouped; and in preallocated memory,
    against torch, without rotations."""
    dtype = DTYPES[case.dtype]
    config = {"xpos_rel_pos": case.xpos}
    module = MultiheadAttention(
        config, case.embed_dim, case.heads, self_attention=True, num_kv_heads=case.key_heads,
        need_weights=False, dtype=dtype,
    ).eval()  # fmt: skip
    shape = (case.batch, case.key_heads, case.length, D)
    key, value = torch.randn(2, *shape, dtype=dtype).unbind()
    x = torch.randn(case.batch, 1, case.embed_dim, dtype=dtype)
    wide, x64 = copy.deepcopy(module).double(), x.double()

    def state(dtype: torch.dtype) -> dict[str, Any]:
        return {"prev_key": key.to(dtype, copy=True), "prev_value": value.to(dtype, copy=True)}

    def oracle() -> Tensor:
        return wide(x64, x64, x64, state(torch.float64))[0]

    if case.key_heads == case.heads:
        own = state(dtype)
        peer = _torchscale(module, x, state(dtype))
        if peer is not None:
            yield Pair({"dict": lambda: module(x, x, x, own)[0], "torchscale": peer}, oracle)
    if not case.xpos:
        cache = StaticCache(case.length + room)
        cache.update(key, value)
        hand = _by_hand(module, x, key, value, room)
        yield Pair({"static": lambda: module(x, x, x, cache)[0], "sdpa": hand}, oracle)


def _torchscale(module: MultiheadAttention, x: Tensor, state: dict[str, Any]) -> Step | None:
    """None where it is not installed."""
    try:
        theirs, _ = torchscale_components()
    except ImportError:
        return None
    args = types.SimpleNamespace(
        multiway=False, layernorm_eps=1e-5, flash_attention=False, xpos_scale_base=512,
        xpos_rel_pos=module.xpos is not None,
    )  # fmt: skip
    peer = theirs(args, module.embed_dim, module.num_heads, self_attention=True).eval()
    peer.load_state_dict(module.state_dict())
    peer.to(x.dtype)

    def step() -> Tensor:
        out: Tensor = peer(x, x, x, incremental_state=state)[0]
        return out

    return step


def _by_hand(module: MultiheadAttention, x: Tensor, key: Tensor, value: Tensor, room: int) -> Step:
    batch, key_heads, length, _ = key.shape
    shape = (batch, key_heads, length + room, D)
    keys, values = key.new_zeros(shape), key.new_zeros(shape)
    keys[:, :, :length], values[:, :, :length] = key, value
    numbers = itertools.count(length)

    def step() -> Tensor:
        at = next(numbers)
        q, k, v = (
            linear(x).view(batch, 1, -1, D).transpose(1, 2)
            for linear in (module.q_proj, module.k_proj, module.v_proj)
        )
        keys[:, :, at : at + 1], values[:, :, at : at + 1] = k, v
        seen = keys[:, :, : at + 1], values[:, :, : at + 1]
        out = F.scaled_dot_product_attention(q, *seen, enable_gqa=True)
        joined: Tensor = module.out_proj(out.transpose(1, 2).reshape(batch, 1, -1))
        return joined

    return step


def measure(case: Case, rounds: int) -> Iterator[Row]:
    """Both pairs of one case: checked, then timed."""
    # Several steps in a row, as in a generation: else each side writes back what the other left in
    # the caches.
    warmup, calls = 2, max(5, min(20, 16384 // (case.length * case.batch)))
    room = (warmup + rounds) * calls + 2
    for pair in pairs_of(case, room):
        pair.check(case)
        name, peer_name = pair.steps
        found = time_interleaved(pair.steps, rounds=rounds, warmup=warmup, calls=calls)
        pair.check_again(case)
        yield case.described() | {
            "cache": name,
            "peer": peer_name,
            "ours us": found[name].median * 1e6,
            "peer us": found[peer_name].median * 1e6,
            "ratio": found[peer_name].median / found[name].median,
            "ratio of bests": found[peer_name].best / found[name].best,
        }


def bandwidth(case: Case, rounds: int) -> Row:
    """The attention alone, and a copy and a sum of as many bytes as its keys and values have."""
    dtype = DTYPES[case.dtype]
    query = torch.randn(case.batch, case.heads, 1, D, dtype=dtype)
    key, value = torch.randn(2, case.batch, case.key_heads, case.length, D, dtype=dtype).unbind()
    # What is copied is half as long, so that reading and writing touch as many bytes.
    source, target = torch.ones(2, key.nbytes, dtype=torch.uint8).unbind()
    numbers = torch.ones(2 * key.nbytes // 4)
    candidates = {
        "attention": lambda: zeta.attention(query, key, value),
        "copy": lambda: target.copy_(source),
        "sum": lambda: numbers.sum(),
    }
    found = time_interleaved(candidates, rounds=rounds, warmup=2, calls=3)
    nbytes = key.nbytes + value.nbytes
    speeds = {name: nbytes / timing.median / 1e9 for name, timing in found.items()}
    return case.described() | {
        "backend": zeta.explain(query, key, value).backend,
        "attention GB/s": speeds["attention"],
        "copy GB/s": speeds["copy"],
        "sum GB/s": speeds["sum"],
        "share": speeds["attention"] / speeds["copy"],
        "share of the sum": speeds["attention"] / speeds["sum"],
    }


def memory(length: int) -> Iterator[Row]:
    """The most that a generation of ``length`` tokens holds, over its final cache.

    Most tokens come without the module: the profiler takes a millisecond an operation.
    """
    module = MultiheadAttention(None, 8 * D, 8, self_attention=True, need_weights=False).eval()
    x, earlier = torch.randn(1, 1, 8 * D), torch.randn(1, 8, 1, D)
    for name, make in (
        ("static", lambda: StaticCache(length)),
        ("dynamic", DynamicCache),
    ):
        held = 0

        def generate(make: Callable[[], Any] = make) -> None:
            nonlocal held
            cache = make()
            for number in range(length):
                if 8 <= number < length - 8:
                    cache.update(earlier, earlier)
                else:
                    module(x, x, x, cache)
            held = cache.nbytes

        peak = peak_bytes(generate, device="cpu")
        tokens = 2 * 8 * length * D * 4
        yield {
            "cache": name, "length": length, "tokens MiB": tokens / 2**20,
            "cache MiB": held / 2**20, "peak MiB": peak / 2**20, "ratio": peak / tokens,
        }  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """Everything but the curve."""
    lengths = (64, 256) if quick else (1024, 8192)
    grid = itertools.product(DTYPES, (1, 2) if quick else (1, 8), lengths)
    found = []
    for dtype, batch, length in grid:
        found += [Case(dtype, batch, 8, 8, length, xpos) for xpos in (False, True)]
        found.append(Case(dtype, batch, 16, 4, length))
    return found


def curve(quick: bool) -> list[Case]:
    """One sequence of growing length."""
    lengths = [256, 512] if quick else [2**n for n in range(8, 17)]
    return [Case("fp32", 1, 8, 8, length) for length in lengths]


def figure(results: Row, path: Path) -> None:
    """Draw the curve of a results file."""
    names = {"static": "Zeta, StaticCache", "sdpa": "torch, preallocated",
             "dict": "Zeta, dict", "torchscale": "TorchScale, dict"}  # fmt: skip
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in names.values()}
    for row in results["curve"]:
        lines[names[row["cache"]]].append((row["length"], row["ours us"]))
        lines[names[row["peer"]]].append((row["length"], row["peer us"]))
    title = f"A step, float32, 8 heads of 64, {results['machine']['processor']}"
    drawn = plots.growth({"microseconds": lines}, axis="cached tokens", title=title)
    plots.save(drawn, path)


def _print_step(row: Row) -> None:
    kind = "xPos" if row["xpos"] else "plain"
    heads = f"{row['heads']}/{row['key_heads']}"
    print(
        f"{row['dtype']} {row['batch']:2} x {heads:5} {kind:5} {row['length']:6} {row['cache']:6} "
        f"{row['ours us']:10.1f} {row['peer']:10} {row['peer us']:10.1f} {row['ratio']:7.2f} "
        f"{row['ratio of bests']:7.2f}",
        flush=True,
    )


def run(quick: bool, rounds: int, path: Path | None) -> Row:
    """Measure everything, and print and write it as it comes."""
    results: Row = {"machine": report.describe_run("torchscale")}
    print(report.headline(results["machine"]))
    try:
        torchscale_components()
    except ImportError as error:
        print(f"dicts are not measured: {error}")
    print(f"{'step':29} {'cache':6} {'ours us':>10} {'peer':10} {'peer us':>10}  median    best")
    parts: dict[str, tuple[Iterator[Row], Callable[[Row], None]]] = {
        "steps": (_steps(cases(quick), rounds), _print_step),
        "curve": (_steps(curve(quick), rounds), _print_step),
        "bandwidth": ((bandwidth(c, rounds) for c in cases(quick) if not c.xpos), _print_bandwidth),
        "memory": (memory(256 if quick else 4096), _print_memory),
    }
    for part, (rows, show) in parts.items():
        print(f"{part}: {TITLES[part]}", flush=True)
        results[part] = []
        for row in rows:
            results[part].append(row)
            show(row)
            report.write(results, path)
    return results


def _steps(todo: list[Case], rounds: int) -> Iterator[Row]:
    for case in todo:
        yield from measure(case, rounds)


TITLES = {
    "steps": "of the whole module",
    "curve": "the same over the length",
    "bandwidth": "of the attention alone, of a copy and of a sum beside it",
    "memory": "of a generation",
}


def _print_bandwidth(row: Row) -> None:
    print(
        f"{row['dtype']} {row['batch']:2} x {row['heads']:2}/{row['key_heads']:<2} "
        f"{row['length']:6} {row['backend']:8} {row['attention GB/s']:7.2f} GB/s, "
        f"copy {row['copy GB/s']:7.2f}, sum {row['sum GB/s']:7.2f}, share {row['share']:.2f} "
        f"and {row['share of the sum']:.2f}",
        flush=True,
    )


def _print_memory(row: Row) -> None:
    print(
        f"{row['cache']:8} {row['length']} tokens of {row['tokens MiB']:.2f} MiB: cache "
        f"{row['cache MiB']:.2f}, peak {row['peak MiB']:.2f} MiB, {row['ratio']:.3f} of the tokens",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, for tests")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each side (default: 9)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--figure", type=Path, help="draw the curve as PNG")
    parser.add_argument("--redraw", type=Path, help="draw this results file; measure nothing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.redraw:
        results = json.loads(arguments.redraw.read_text())
    else:
        results = run(arguments.quick, 2 if arguments.quick else arguments.rounds, arguments.out)
    if arguments.figure:
        figure(results, arguments.figure)


if __name__ == "__main__":
    main()
