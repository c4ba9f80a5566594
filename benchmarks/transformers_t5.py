"""A training step of Transformers' T5 on Zeta, beside ``eager`` and ``sdpa``, on the CPU.

Usage: ``python -m benchmarks.transformers_t5 [--quick] [--vocabulary N] [--out FILE]``. Needs the
extra ``transformers``.

T5 with 2 encoder and 2 decoder layers, d_model 512, 8 heads, d_ff 2048, dropout 0.1, float32; as
many target as source tokens, an eighth of the second sequence onwards padded. A step is forward,
backward and plain gradient descent. The vocabulary is small by default, for the head's product says
nothing about attention; that of T5 has 32,128 pieces.

Without dropout, losses and gradients are first compared with those of ``eager``. Then steps are
timed in turn, in one process, and the memory of one step of each is measured. One more way adds
queries, keys and values up instead of attending: what is left of a step is the same for all, and no
kernel for attention can make it faster than that.
"""

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from zeta.bench import peak_bytes, time_interleaved
from zeta.integrations import huggingface


@dataclasses.dataclass(frozen=True)
class Way:
    """How attention runs: an implementation's name, and for Zeta the form of the bias."""

    implementation: str
    structured_bias: bool = False


WAYS = {
    "zeta, bias as table": Way("zeta", structured_bias=True),
    "zeta, bias as tensor": Way("zeta"),
    "eager": Way("eager"),
    "sdpa": Way("sdpa"),
}
OURS, *_, EAGER, SDPA = WAYS
CEILING = "no attention"
LEAST_FASTER = {512: 1.5, 1536: 2.5}
MOST_MEMORY = {1536: 0.5}
ROUNDING = 1e-6


def _add_up(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """Instead of attention: all three have a gradient, at next to no cost."""
    return (query + key + value).transpose(1, 2).contiguous(), None


def register_ceiling() -> None:
    """Let Transformers know `CEILING`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(CEILING, _add_up)
    AttentionMaskInterface.register(CEILING, sdpa_mask)


def build(vocabulary: int, width: int, dropout: float, feed_forward: str = "relu") -> Any:
    """A T5 with random weights, always the same."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // 8,
        d_ff=4 * width,
        num_layers=2,
        num_heads=8,
        dropout_rate=dropout,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(0)
    return T5ForConditionalGeneration._from_config(config, attn_implementation="eager").train()


def batch(vocabulary: int, size: int, length: int) -> dict[str, Tensor]:
    """Random tokens, all sequences but the first padded at the end."""
    generator = torch.Generator().manual_seed(1)
    shape = (size, length)
    source, labels = (torch.randint(1, vocabulary, shape, generator=generator) for _ in range(2))
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1:, length - length // 8 :] = 0
    return {"input_ids": source, "attention_mask": mask, "labels": labels}


def step(model: Any, way: Way, given: dict[str, Tensor]) -> Callable[[], float]:
    """One training step, which leaves the weights all but unchanged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def run() -> float:
        huggingface.register(structured_bias=way.structured_bias)
        if model.config._attn_implementation != way.implementation:
            model.set_attn_implementation(way.implementation)
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run


def check(vocabulary: int, width: int, given: dict[str, Tensor]) -> dict[str, float]:
    """The largest relative error of loss and gradients of each way, against float64.

    Raises:
        AssertionError: One is above twice that of ``eager`` in float32 for the same tensor, and
            `ROUNDING`.
    """
    # A relu on the other side of 0 by rounding would be taken for an error of attention.
    model = build(vocabulary, width, dropout=0.0, feed_forward="gated-gelu")
    exact = outcome(copy.deepcopy(model).double(), WAYS[EAGER], given)
    found = {name: outcome(model, way, given) for name, way in WAYS.items()}
    errors = {
        name: {
            key: float((t - exact[key]).norm() / exact[key].norm()) for key, t in tensors.items()
        }
        for name, tensors in found.items()
    }
    for name, of_tensors in errors.items():
        for key, error in of_tensors.items():
            most = 2 * errors[EAGER][key] + ROUNDING
            assert error <= most, f"{name}, {key}: off by {error:.2g}, more than {most:.2g}"
    return {name: max(of_tensors.values()) for name, of_tensors in errors.items()}


def outcome(model: Any, way: Way, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients."""
    loss = torch.tensor(step(model, way, given)(), dtype=torch.float64)
    gradients = {key: p.grad.double() for key, p in model.named_parameters()}
    return {"loss": loss} | gradients


def measure(size: int, length: int, *, vocabulary: int, width: int, rounds: int) -> dict[str, Any]:
    """Errors, medians in seconds, peaks in bytes, and ratios, at one shape."""
    given = batch(vocabulary, size, length)
    errors = check(vocabulary, width, given)
    model = build(vocabulary, width, dropout=0.1)
    steps = {name: step(model, way, given) for name, way in WAYS.items()}
    times = time_interleaved(steps | {CEILING: step(model, Way(CEILING), given)}, rounds=rounds)
    peaks = {name: peak_bytes(run, "cpu") for name, run in steps.items()}
    better = min(times[EAGER].median, times[SDPA].median)
    leaner = min(peaks[EAGER], peaks[SDPA])
    return {
        "batch": size,
        "length": length,
        "errors": errors,
        "seconds": {name: time.median for name, time in times.items()},
        "all seconds": {name: time.seconds for name, time in times.items()},
        "peak bytes": peaks,
        "times faster": {name: better / time.median for name, time in times.items()},
        "share of memory": {name: peaks[name] / leaner for name in WAYS},
        "spread": {
            name: statistics.pstdev(time.seconds) / time.median for name, time in times.items()
        },
    }


def judge(row: dict[str, Any]) -> list[str]:
    """The bars that a row misses."""
    missed = []
    faster, share = row["times faster"][OURS], row["share of memory"][OURS]
    least, most = LEAST_FASTER.get(row["length"]), MOST_MEMORY.get(row["length"])
    if least is not None and faster < least:
        missed.append(f"{row['length']} tokens: {faster:.2f} times faster, not {least}")
    if most is not None and share > most:
        missed.append(f"{row['length']} tokens: {share:.2f} of the memory, not {most}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    shapes, width, rounds = [(4, 512), (1, 1536)], 512, arguments.rounds
    if arguments.quick:
        shapes, width, rounds = [(2, 40), (1, 72)], 64, 1
    register_ceiling()
    machine = report.describe_run("transformers")
    print(report.headline(machine), flush=True)
    results: dict[str, Any] = {"machine": machine, "vocabulary": arguments.vocabulary, "rows": []}
    for size, length in shapes:
        print(f"batch {size}, {length} tokens: checking, then timing", flush=True)
        row = measure(size, length, vocabulary=arguments.vocabulary, width=width, rounds=rounds)
        results["rows"].append(row)
        results["missed"] = [missed for each in results["rows"] for missed in judge(each)]
        report.write(results, arguments.out)
        show(row)
    print("\n".join(results["missed"]) or "no bar is missed")


def show(row: dict[str, Any]) -> None:
    """Print a row: a line for each way."""
    for name in WAYS:
        print(
            f"  {name:21} {row['seconds'][name] * 1e3:9.1f} ms  "
            f"{row['times faster'][name]:5.2f}x  {row['peak bytes'][name] / 2**20:8.1f} MiB  "
            f"{row['share of memory'][name]:5.2f}  error {row['errors'][name]:.1e}"
        )
    print(
        f"  {CEILING:21} {row['seconds'][CEILING] * 1e3:9.1f} ms  "
        f"{row['times faster'][CEILING]:5.2f}x  (the most that attention can give)",
        flush=True,
    )


if __name__ == "__main__":
    main()
