"""The rows of the CPU benchmark: attention's own work, ours and torch's.

Shape suffixes: B batch, H heads, G key heads, T length, S cached length, D head dimension.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu_problem import Features, Problem, Results, Run, Shape
from zeta import attention
from zeta.ops.attention import run_with_weights
from zeta.ops.call import AttentionCall

SHAPES: dict[str, Shape] = {"A": (1, 16, 2048, 64), "B": (8, 8, 512, 64), "C": (1, 8, 4096, 128)}
QUICK_SHAPES: dict[str, Shape] = {"quick": (1, 4, 200, 64)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Work:
    """One piece of work done in two ways.

    Attributes:
        ours, peer: What is timed. They return results by name, gradients among them.
        oracle: The reference in float64 on the same numbers.
        checked: What must agree with the oracle: both, where each side does not drop other weights.
        bound: The largest root mean square of an error, relative to that of the result.
        is_peer_rough: Whether the peer rounds more than this work asks for, so that its gradients
            say nothing: its output alone shows that it is the same.
        reads: What a step must read from memory, where that bounds its time.
        calls: Calls in one timing.
    """

    ours: Run
    peer: Run
    oracle: Run
    checked: Mapping[str, Run]
    bound: float
    is_peer_rough: bool = False
    reads: tuple[Tensor, ...] = ()
    calls: int = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table, made only when its turn comes.

    Attributes:
        bar, aim: Of the peer's time over ours.
    """

    name: str
    shape: str
    make: Callable[[], Work]
    bar: float | None = None
    aim: float | None = None


Bars = tuple[Mapping[str, float], float | None]


def _bars(a: float, b: float, c: float, aim: float | None = None) -> Bars:
    return {"A": a, "B": b, "C": c}, aim


PLAIN, CAUSAL, T5 = Features(), Features(causal=True), Features(t5=True)
DROPOUT = Features(dropout_p=0.1)
T5_CAUSAL = Features(t5=True, causal=True)
EVERYTHING = Features(causal=True, t5=True, padding=True, dropout_p=0.1)
HIGH, HIGH_CAUSAL = Features(precision="high"), Features(precision="high", causal=True)
PADDING = Features(padding=True)
COSTS = _bars(1 / 1.35, 1 / 1.35, 1 / 1.35, 1 / 1.2)
NONE: Bars = ({}, None)

# Name, dtype, what is on, whether it trains, bars.
TABLE: tuple[tuple[str, str, Features, bool, Bars], ...] = (
    ("forward", "bf16", PLAIN, False, _bars(1.6, 1.5, 1.5, 2.1)),
    ("forward causal", "bf16", CAUSAL, False, _bars(2.0, 2.0, 1.6, 2.6)),
    ("training", "bf16", PLAIN, True, _bars(3.0, 3.0, 2.4, 4.0)),
    ("training causal", "bf16", CAUSAL, True, _bars(3.6, 4.0, 2.6, 5.0)),
    ("training T5", "bf16", T5, True, _bars(14.0, 9.0, 13.0, 24.0)),
    ("training T5 causal", "bf16", T5_CAUSAL, True, NONE),
    ("training dropout", "bf16", DROPOUT, True, _bars(20.0, 14.0, 18.0, 32.0)),
    ("forward", "fp32", PLAIN, False, _bars(1.4, 1.4, 1.4, 1.75)),
    ("forward causal", "fp32", CAUSAL, False, _bars(1.6, 1.6, 1.6, 2.2)),
    ("training", "fp32", PLAIN, True, _bars(1.4, 1.4, 1.4, 1.75)),
    ("training causal", "fp32", CAUSAL, True, _bars(1.6, 1.6, 1.6, 2.2)),
    ("training T5", "fp32", T5, True, _bars(3.5, 2.8, 3.5, 5.0)),
    ("training T5 causal", "fp32", T5_CAUSAL, True, NONE),
    ("training dropout", "fp32", DROPOUT, True, _bars(7.0, 5.0, 5.0, 10.0)),
    ("forward high", "fp32", HIGH, False, _bars(2.1, 2.1, 2.1, 3.0)),
    ("forward high causal", "fp32", HIGH_CAUSAL, False, NONE),
    ("training high", "fp32", HIGH, True, _bars(2.1, 2.1, 2.1, 3.0)),
    ("training high causal", "fp32", HIGH_CAUSAL, True, NONE),
    ("everything forward", "bf16", EVERYTHING, False, COSTS),
    ("everything training", "bf16", EVERYTHING, True, COSTS),
    ("everything forward", "fp32", EVERYTHING, False, COSTS),
    ("everything training", "fp32", EVERYTHING, True, COSTS),
)


LENGTHS = (197, 272, 320, 577, 784)
"""Of 8 sequences and 8 heads of 64 side by side: lengths that no block of a kernel divides."""

WINDOWED: Shape = (1, 16, 2048, 64)
WINDOWS = (64, 256, 1024)

ALL_HEADS, ALL_LENGTHS = (1, 8, 32), (1, 2, 4, 8, 16, 32, 64)
SOME_HEADS, SOME_LENGTHS = (1, 8), (4, 16, 64)

Bar = tuple[float | None, float | None]

# Name, what is on, whether it trains, heads, lengths, bar and aim. A fixed T5 bias is looked up in
# each call of ours, and ready made for torch: it has no bar.
SMALL: tuple[tuple[str, Features, bool, tuple[int, ...], tuple[int, ...], Bar], ...] = (
    ("", PLAIN, False, ALL_HEADS, ALL_LENGTHS, (0.95, 1.3)),
    (" causal", CAUSAL, False, ALL_HEADS, ALL_LENGTHS, (0.95, 1.3)),
    (" training", PLAIN, True, ALL_HEADS, ALL_LENGTHS, (0.95, None)),
    (" padding", PADDING, False, SOME_HEADS, SOME_LENGTHS, (0.95, 1.3)),
    (" T5", T5, False, SOME_HEADS, SOME_LENGTHS, (None, None)),
    (" training padding", PADDING, True, SOME_HEADS, SOME_LENGTHS, (0.95, None)),
    (" training T5", T5, True, SOME_HEADS, SOME_LENGTHS, (0.95, None)),
    (" training dropout", DROPOUT, True, SOME_HEADS, SOME_LENGTHS, (0.95, None)),
)


BOUNDS = {torch.bfloat16: 2.0**-6, torch.float32: 1e-5}
HIGH_BOUND = 1e-4


def attention_rows(shapes: Mapping[str, Shape]) -> Iterator[Row]:
    """Attention forward, and forward and backward; then its average weights."""
    for name, dtype, features, train, (bars, aim) in TABLE:
        for label, shape in shapes.items():
            make = partial(work_of, shape, DTYPES[dtype], features, train)
            yield Row(f"{dtype} {name}", label, make, bars.get(label), aim)
    for dtype, bar, aim in (("bf16", 4.5, 7.5), ("fp32", 2.3, 3.5)):
        for label, shape in shapes.items():

            def make_weights(shape: Shape = shape, dtype: str = dtype) -> Work:
                return _mean_weights(shape, DTYPES[dtype])

            yield Row(f"{dtype} forward and mean weights", label, make_weights, bar, aim)


def work_of(
    shape: Shape,
    dtype: torch.dtype,
    features: Features,
    train: bool,
    *,
    side_by_side: bool = False,
) -> Work:
    """Ours and torch's; where everything is on, the peer is our own plain causal attention."""
    problem = Problem(shape, dtype, features, train, side_by_side=side_by_side)
    everything = features == EVERYTHING
    peer: Run = Problem(shape, dtype, CAUSAL, train).ours if everything else problem.torch_does()
    bound = BOUNDS[dtype] if features.precision == "highest" else HIGH_BOUND
    checked = {"ours": problem.ours} | ({} if features.dropout_p else {"peer": peer})
    return Work(problem.ours, peer, problem.oracle, checked, bound)


def length_rows(quick: bool) -> Iterator[Row]:
    """Lengths as they come, and heads side by side."""
    for dtype in DTYPES:
        for name, features, train in (
            ("forward", PLAIN, False),
            ("training", PLAIN, True),
            ("training causal", CAUSAL, True),
        ):
            for length in LENGTHS[:1] if quick else LENGTHS:
                shape = (8, 8, length, 64)
                make = partial(work_of, shape, DTYPES[dtype], features, train, side_by_side=True)
                yield Row(f"{dtype} lengths {name}", f"T {length}", make)


def window_rows(quick: bool) -> Iterator[Row]:
    """Sliding windows, of which torch knows only a mask."""
    shape = QUICK_SHAPES["quick"] if quick else WINDOWED
    for dtype in DTYPES:
        for name, train in (("forward", False), ("training", True)):
            for window in WINDOWS[:1] if quick else WINDOWS:
                features = Features(window=window)
                make = partial(work_of, shape, DTYPES[dtype], features, train)
                yield Row(f"{dtype} window {name}", str(window), make)


def _mean_weights(shape: Shape, dtype: torch.dtype) -> Work:
    batch, heads, length, head_dim = shape
    query, key, value = (torch.randn(shape).to(dtype) for _ in range(3))

    def ours() -> Results:
        # As the module does for need_weights="mean".
        out, weights = run_with_weights(AttentionCall.checked(query, key, value), mean=True)
        return {"out": out, "weights": weights}

    def textbook(query: Tensor, key: Tensor, value: Tensor) -> Results:
        q, k, v = (x.reshape(batch * heads, length, head_dim) for x in (query, key, value))
        weights = torch.softmax(torch.bmm(q / math.sqrt(head_dim), k.mT), dim=-1)
        out = torch.bmm(weights, v).view(shape)
        return {"out": out, "weights": weights.view(batch, heads, length, length).mean(1)}

    def peer() -> Results:
        return textbook(query, key, value)

    def oracle() -> Results:
        return textbook(query.double(), key.double(), value.double())

    return Work(ours, peer, oracle, {"ours": ours, "peer": peer}, BOUNDS[dtype])


def decode_rows(quick: bool) -> Iterator[Row]:
    """One query over a cache, 16 heads over 4: against torch, and against reading the cache."""
    lengths = {200: (None, None)} if quick else {1024: (1.3, 2.0), 8192: (1.9, 2.0)}
    for dtype in DTYPES:
        for head_dim in (64, 128):
            for cached, (bar, aim) in lengths.items():
                required = (bar, aim) if dtype == "bf16" else (None, None)

                def make(
                    dtype: str = dtype, head_dim: int = head_dim, cached: int = cached
                ) -> Work:
                    return _decode(DTYPES[dtype], head_dim, cached)

                yield Row(f"{dtype} decode D {head_dim}", f"S {cached}", make, *required)


def _decode(dtype: torch.dtype, head_dim: int, cached: int) -> Work:
    query = torch.randn(1, 16, 1, head_dim).to(dtype)
    key, value = (torch.randn(1, 4, cached, head_dim).to(dtype) for _ in range(2))

    def ours() -> Results:
        return {"out": attention(query, key, value)}

    def peer() -> Results:
        return {"out": F.scaled_dot_product_attention(query, key, value, enable_gqa=True)}

    def oracle() -> Results:
        wide = (x.double() for x in (query, key, value))
        return {"out": attention(*wide, backend="reference")}

    checked = {"ours": ours, "peer": peer}
    return Work(ours, peer, oracle, checked, BOUNDS[dtype], reads=(key, value), calls=20)


def small_rows(quick: bool) -> Iterator[Row]:
    """Calls so short that the cost of a call counts."""
    for dtype in DTYPES:
        for kind, features, train, heads, lengths, bars in SMALL:
            for num_heads in (8,) if quick else heads:
                for length in lengths:
                    if quick and length not in (1, 16):
                        continue
                    # The weights of a single token are 1, and its gradients 0.
                    if train and length == 1:
                        continue

                    def make(
                        dtype: str = dtype,
                        shape: Shape = (1, num_heads, length, 64),
                        features: Features = features,
                        train: bool = train,
                    ) -> Work:
                        work = work_of(shape, DTYPES[dtype], features, train)
                        return dataclasses.replace(work, calls=20 if train else 50)

                    yield Row(f"{dtype} small{kind}", f"H {num_heads} T {length}", make, *bars)
