"""One grid of calls for every backend, and what the reference makes of them."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from zeta import attention, attention_weights, attention_with_lse, biases, masks
from zeta.ops.attention import run_with_weights
from zeta.ops.backends import load
from zeta.ops.call import AttentionCall

Made = dict[str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A call on random tensors; ``mask`` and ``bias`` are made from `tensors`.

    Each is equal to itself alone: what follows from it can be kept by it.
    """

    name: str
    batch: int = 2
    heads: int = 4
    key_heads: int = 4
    target: int = 7
    source: int = 7
    head_dim: int = 8
    value_dim: int | None = None
    learned: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    mask: Callable[[], masks.Mask] | None = None
    bias: Callable[[Made], biases.Bias] | None = None
    dropout_p: float = 0.0
    layout: str = "BHTD"
    magnitude: float = 1.0
    query_positions: list[list[int]] | None = None
    key_positions: list[list[int]] | None = None

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> Made:
        """Fresh leaves, the same numbers in each dtype up to rounding to ``dtype``."""
        generator = torch.Generator().manual_seed(len(self.name) * 1009 + self.target)
        shapes = {
            "query": (self.batch, self.heads, self.target, self.head_dim),
            "key": (self.batch, self.key_heads, self.source, self.head_dim),
            "value": (self.batch, self.key_heads, self.source, self.value_dim or self.head_dim),
            **self.learned,
        }
        made = {}
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name in ("query", "key"):
                tensor = tensor * self.magnitude
            made[name] = self._laid_out(name, tensor.to(dtype)).to(device).requires_grad_()
        return made

    def _laid_out(self, name: str, tensor: Tensor) -> Tensor:
        if name not in ("query", "key", "value") or self.layout == "BHTD":
            return tensor
        if self.layout == "BTHD":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "BHDT":
            return tensor.mT.contiguous().mT
        raise ValueError(self.layout)

    def run(self, made: Made, backend: str, *, lse: bool = True) -> dict[str, Tensor]:
        """Outputs and the gradients of every leaf."""
        arguments = self.arguments(made)
        leaves = made
        if lse:
            out, log_sum = attention_with_lse(
                made["query"], made["key"], made["value"], backend=backend, **arguments
            )
            finite = torch.where(log_sum == float("-inf"), 0.0, log_sum)
            loss = (out.double() * _weighting(out)).sum() + (finite * _weighting(finite)).sum()
            results = {"out": out, "lse": log_sum}
        else:
            out = attention(made["query"], made["key"], made["value"], backend=backend, **arguments)
            loss = (out.double() * _weighting(out)).sum()
            results = {"out": out}
        return results | _gradients(loss, leaves)

    def run_weights(self, made: Made, backend: str, reduce: str | None) -> dict[str, Tensor]:
        """Weights and the gradients of every leaf but the values."""
        arguments = self.arguments(made)
        del arguments["dropout_p"], arguments["seed"]
        weights = attention_weights(
            made["query"], made["key"], reduce=reduce, backend=backend, **arguments
        )
        leaves = {name: leaf for name, leaf in made.items() if name != "value"}
        loss = (weights.double() * _weighting(weights)).sum()
        return {"weights": weights} | _gradients(loss, leaves)

    @torch.no_grad()
    def run_both(self, made: Made, backend: str, reduce: str | None) -> dict[str, Tensor]:
        """Output and weights of one pass."""
        call = AttentionCall.checked(
            made["query"], made["key"], made["value"], **self.arguments(made)
        )
        out, weights = run_with_weights(call, mean=reduce == "mean", backend=backend)
        return {"out": out, "weights": weights}

    def arguments(self, made: Made) -> dict[str, object]:
        """Keyword arguments of the op."""
        device = made["query"].device

        def positions(rows: list[list[int]] | None) -> Tensor | None:
            return None if rows is None else torch.tensor(rows, device=device)

        with torch.device(device):
            mask = None if self.mask is None else self.mask()
        return {
            "mask": mask,
            "bias": None if self.bias is None else self.bias(made),
            "dropout_p": self.dropout_p,
            "seed": 1234567890123,
            "query_positions": positions(self.query_positions),
            "key_positions": positions(self.key_positions),
        }


def _weighting(tensor: Tensor) -> Tensor:
    """Fixed numbers of order one, so that no gradient is symmetric."""
    generator = torch.Generator().manual_seed(tensor.numel())
    numbers = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return numbers.to(tensor.device)


def _gradients(loss: Tensor, leaves: Made) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True)}


Expected = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What the reference makes of the same numbers: in the dtype of the call, and in float64."""


def expected(case: Case, dtype: torch.dtype, *, lse: bool = True) -> Expected:
    """What `Case.run` is held to, on its `Case.tensors` of a dtype."""
    return _expected(case, dtype, lse=lse)


def expected_weights(case: Case, dtype: torch.dtype, reduce: str | None) -> Expected:
    """What `Case.run_weights` is held to."""
    return _expected(case, dtype, kind="run_weights", reduce=reduce)


def expected_both(case: Case, dtype: torch.dtype, reduce: str | None) -> Expected:
    """What `Case.run_both` is held to."""
    return _expected(case, dtype, kind="run_both", reduce=reduce)


# Every backend and every instruction set is held to the same numbers.
@functools.lru_cache(maxsize=2048)
def _expected(case: Case, dtype: torch.dtype, kind: str = "run", **options: object) -> Expected:
    made = case.tensors(dtype)
    low, oracle = (
        getattr(case, kind)(leaves, "reference", **options) for leaves in (made, widened(made))
    )
    # No graph is kept with them.
    return _detached(low), _detached(oracle)


def _detached(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in results.items()}


def reasons(case: Case, backend: str) -> tuple[str, ...]:
    """Why a backend does not take a case on float32 tensors; empty if it does."""
    made = case.tensors(torch.float32)
    call = AttentionCall.checked(made["query"], made["key"], made["value"], **case.arguments(made))
    return tuple(load(backend).unsupported(call))


def widened(made: Made) -> Made:
    """The same numbers in float64."""
    return {name: leaf.detach().cpu().double().requires_grad_() for name, leaf in made.items()}


def _lengths(*lengths: int) -> Tensor:
    return torch.tensor(lengths)


def _bits(*shape: int, keep: float = 0.6) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    bits = torch.rand(shape, generator=generator, device="cpu") < keep
    # Onto the default device, which a test may have set.
    return bits.to(torch.empty(0).device)


def _dense(*shape: int, **sizes: int) -> Case:
    name = "dense bias " + "x".join(map(str, shape))
    return Case(
        name, learned={"bias": shape}, bias=lambda made: biases.Dense(made["bias"]), **sizes
    )


def far_from_zero(value: float, **sizes: int) -> Case:
    """Every third row has scores near ``value``, as by a mask that adds it: their log-sum-exp has
    little or no place for the log of a number of keys.
    """

    def bias(made: Made) -> biases.Bias:
        target = made["query"].shape[2]
        rows = torch.where(torch.arange(target)[:, None] % 3 == 0, value, 0.0)
        return biases.Bucketed(made["table"], max_distance=20) + biases.Dense(rows.float())

    return Case(f"far from zero {value:.3g}", learned=TABLE, bias=bias, **sizes)


TABLE = {"table": (32, 4)}
T5 = {"learned": TABLE, "bias": lambda made: biases.Bucketed(made["table"], max_distance=20)}
T5_CAUSAL = {
    "learned": TABLE,
    "bias": lambda made: biases.Bucketed(made["table"], bidirectional=False, max_distance=20),
    "mask": masks.Causal,
}
LONG = {"target": 83, "source": 83}

PLAIN = [
    Case("plain"),
    Case("one query", target=1),
    Case("one key", source=1),
    Case("odd head_dim", head_dim=13, target=5, source=9),
    Case("wider values", value_dim=12),
    Case("grouped heads", key_heads=2),
    Case("one key head", key_heads=1, source=11),
    Case("heads inside", layout="BTHD"),
    Case("length inside", layout="BHDT"),
    Case("large scores", magnitude=8.0),
    Case("long", target=130, source=257, batch=1, heads=2, key_heads=1),
    Case("longer", target=20, source=385, batch=1, heads=2, key_heads=1),
]
MASKED = [
    Case("causal", mask=masks.Causal),
    Case("causal one query", mask=masks.Causal, target=1, source=9),
    Case("causal after a cache", mask=masks.Causal, target=3, source=9),
    Case("causal more queries than keys", mask=masks.Causal, target=9, source=4),
    Case("causal long", mask=masks.Causal, batch=1, **LONG),
    Case("window", mask=lambda: masks.SlidingWindow(3)),
    Case("window long", mask=lambda: masks.SlidingWindow(17), batch=1, **LONG),
    Case("prefix", mask=lambda: masks.PrefixLM(_lengths(3, 0))),
    Case("documents", mask=lambda: masks.Documents(torch.tensor([[0, 0, 0, 1, 1, 2, 2]] * 2))),
    Case(
        "documents causal",
        mask=lambda: masks.Documents(torch.tensor([[5, 5, 0, 0, 0, 5, 1]] * 2)) & masks.Causal(),
        target=4,
    ),
    Case("prefix of any number", mask=lambda: masks.PrefixLM(_lengths(-5, 2**40))),
    Case("padding", mask=lambda: masks.Padding(_lengths(7, 3))),
    Case("padding of any number", mask=lambda: masks.Padding(_lengths(2**40, -(2**40)))),
    Case("padding with an empty sequence", mask=lambda: masks.Padding(_lengths(0, 5))),
    Case("padding causal", mask=lambda: masks.Padding(_lengths(7, 2)) & masks.Causal()),
    Case("keep full", mask=lambda: masks.keep(_bits(2, 4, 7, 7))),
    Case("keep keys", mask=lambda: masks.keep(_bits(2, 1, 1, 7)), key_heads=2),
    Case("drop two dimensions", mask=lambda: masks.drop(_bits(7, 7, keep=0.5))),
    Case("drop all of a head", mask=lambda: masks.drop(_bits(1, 4, 7, 1, keep=0.5))),
    Case("either", mask=lambda: masks.SlidingWindow(2) | masks.keep(_bits(2, 1, 1, 7, keep=0.3))),
    Case(
        "nested",
        mask=lambda: (
            (masks.Causal() | masks.PrefixLM(_lengths(2, 4))) & masks.Padding(_lengths(6, 7))
        ),
    ),
]
BIASED = [
    _dense(2, 4, 7, 7),
    _dense(1, 4, 7, 7),
    _dense(2, 1, 7, 7),
    _dense(7, 7),
    _dense(2, 1, 1, 7),
    _dense(1, 4, 7, 1),
    _dense(1, 4, 40, 50, target=40, source=50),
    Case(
        "three dense biases",
        learned={"bias": (2, 4, 7, 7), "keys": (2, 1, 1, 7)},
        # A number that changes no weight, but beside which half precision keeps little.
        bias=lambda m: (
            biases.Dense(m["bias"].new_full((), -255.0))
            + biases.Dense(m["bias"])
            + biases.Dense(m["keys"])
        ),
    ),
    Case("t5", **T5),
    Case("t5 long", **T5, batch=1, **LONG),
    Case("t5 causal", **T5_CAUSAL),
    Case("t5 causal long", **T5_CAUSAL, **LONG, key_heads=2),
    Case("t5 after a cache", **T5_CAUSAL, target=3, source=40),
    Case("t5 bidirectional causal", **{**T5, "mask": masks.Causal}, **LONG),
    Case(
        "alibi",
        learned={"slopes": (32,)},
        bias=lambda m: biases.Alibi(m["slopes"]),
        heads=32,
        key_heads=32,
        source=9,
    ),
    Case(
        "alibi causal long",
        learned={"slopes": (32,)},
        bias=lambda m: biases.Alibi(m["slopes"]),
        mask=masks.Causal,
        batch=1,
        heads=32,
        key_heads=8,
        **LONG,
    ),
    Case("softcap", bias=lambda m: biases.Softcap(2.0), magnitude=2.0),
    Case(
        "softcap, then t5",
        learned=TABLE,
        bias=lambda m: biases.Softcap(2.0) + biases.Bucketed(m["table"], max_distance=20),
        **LONG,
    ),
    Case(
        "t5, then softcap",
        learned=TABLE,
        bias=lambda m: biases.Bucketed(m["table"], max_distance=20) + biases.Softcap(2.0),
        **LONG,
    ),
    Case(
        "dense and t5 and alibi",
        heads=32,
        key_heads=32,
        learned={"bias": (1, 32, 1, 30), "table": (16, 32), "slopes": (32,)},
        bias=lambda m: (
            biases.Dense(m["bias"]) + biases.Bucketed(m["table"]) + biases.Alibi(m["slopes"])
        ),
        target=30,
        source=30,
    ),
]
DROPPED = [
    Case("dropout", dropout_p=0.3),
    Case("dropout grouped", dropout_p=0.1, key_heads=2, mask=masks.Causal),
    Case("dropout long", dropout_p=0.1, batch=1, **LONG),
    Case(
        "everything",
        dropout_p=0.1,
        learned={"table": (32, 4), "bias": (1, 1, 83, 83)},
        bias=lambda m: biases.Bucketed(m["table"], max_distance=20) + biases.Dense(m["bias"]),
        mask=lambda: masks.Causal() & masks.Padding(_lengths(83, 50)),
        key_heads=2,
        **LONG,
    ),
]
PLACED = [
    Case(
        "left padding by positions",
        **T5_CAUSAL,
        query_positions=[[0, 1, 2, 3, 4, 5, 6], [-1, -1, 0, 1, 2, 3, 4]],
        key_positions=[[0, 1, 2, 3, 4, 5, 6], [-1, -1, 0, 1, 2, 3, 4]],
    ),
    Case(
        "unfilled slots",
        mask=masks.Causal,
        target=2,
        source=8,
        query_positions=[[4, 5]],
        key_positions=[[0, 1, 2, 3, 4, 5, -1, -1]],
    ),
    Case(
        "a ring of slots",
        mask=lambda: masks.SlidingWindow(4),
        target=1,
        source=6,
        query_positions=[[8]],
        key_positions=[[6, 7, 8, 3, 4, 5]],
        dropout_p=0.2,
    ),
]
CASES = PLAIN + MASKED + BIASED + DROPPED + PLACED

BY_KERNELS = {"either", "nested", "left padding by positions"}
REFUSED = {
    "sdpa": {
        "wider values", "length inside", "window long", "dense bias 2x4x7x7", "dense bias 1x4x7x7",
        "dense bias 2x1x7x7", "dense bias 7x7", "dense bias 2x1x1x7", "dense bias 1x4x7x1",
        "dense bias 1x4x40x50", "three dense biases", "t5", "t5 long", "t5 causal",
        "t5 causal long", "t5 after a cache", "t5 bidirectional causal", "alibi",
        "alibi causal long", "softcap", "softcap, then t5", "t5, then softcap",
        "dense and t5 and alibi", "dropout", "dropout grouped", "dropout long", "everything",
        "left padding by positions", "a ring of slots",
    },
    "cpu": BY_KERNELS,
    "triton": BY_KERNELS,
}  # fmt: skip
"""Names of the cases that a backend does not take; all others it must."""


def taken(backend: str) -> list[Case]:
    """The cases that a backend must take."""
    return [case for case in CASES if case.name not in REFUSED.get(backend, ())]
