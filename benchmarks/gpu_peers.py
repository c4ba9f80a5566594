"""What the GPU kernels are measured against, the same functions by torch's own means, and what
all of them are checked against.

Shape suffixes: B batch, H heads, T queries, S keys, D head dimension.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zeta import attention, attention_weights, biases, masks
from zeta.positions import t5_buckets

NUM_BUCKETS = 32
DTYPE = torch.bfloat16
OURS, RIVALS = 2.0**-8, 2.0**-4
"""How far a result may be from float64, beside twice what the reference in the inputs' dtype is.
Rivals may round scores, biases and parts of sums to that dtype; a wrong mask is further off.
"""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: sizes, and what is done to the scores.

    Attributes:
        bias: "" for none, "t5" for a learned table, "dense" for a learned ``(1, H, T, T)``, which
            hides what lies ahead, too, where that is hidden.
        padded: Every sequence is shorter than the batch by up to a half.
        weights: "" for the output; "mean" or "each" for attention weights in its place.
        backward: Whether gradients are part of it.
        queries: How many, where not as many as keys: tokens that meet a cache.
        key_heads: How many, where not as many as query heads.
    """

    batch: int
    heads: int
    length: int
    dim: int
    causal: bool
    bias: str = ""
    padded: bool = False
    dropout_p: float = 0.0
    weights: str = ""
    backward: bool = True
    queries: int = 0
    key_heads: int = 0

    @property
    def flops(self) -> float:
        """Of the products that plain attention makes; padding counts in full."""
        products = 2.0 * (2 if not self.weights else 1) * (3.5 if self.backward else 1.0)
        area = (self.queries or self.length) * self.length * (0.5 if self.causal else 1.0)
        return products * self.batch * self.heads * area * self.dim

    @property
    def cache_bytes(self) -> float:
        """Of keys and values in half precision: what a decoding step must read."""
        return 4.0 * self.batch * (self.key_heads or self.heads) * self.length * self.dim

    def smaller(self) -> "Problem":
        """The same in little, for a check against float64 of the same compiled kernels. A step of
        decoding as it is: into how many parts keys are split depends on its sizes.
        """
        if self.queries:
            return self
        return dataclasses.replace(self, batch=min(self.batch, 2), length=min(self.length, 1024))

    def __str__(self) -> str:
        parts = [f"B{self.batch} H{self.heads} T{self.length} D{self.dim}"]
        parts += [f"{self.queries} queries, {self.key_heads} key heads"] if self.queries else []
        parts += ["causal"] if self.causal else ["full"]
        parts += [self.bias] if self.bias else []
        parts += ["padded"] if self.padded else []
        parts += [f"dropout {self.dropout_p}"] if self.dropout_p else []
        parts += [f"{self.weights} weights"] if self.weights else []
        return " ".join([*parts, "fwd+bwd" if self.backward else "fwd"])


@dataclasses.dataclass
class Inputs:
    """Fresh random tensors of a problem."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    table: Tensor
    dense: Tensor | None
    lengths: Tensor

    @classmethod
    def of(cls, problem: Problem) -> "Inputs":
        queries = (problem.batch, problem.heads, problem.queries or problem.length, problem.dim)
        keys = (problem.batch, problem.key_heads or problem.heads, problem.length, problem.dim)
        query, key, value = (_random(*shape).requires_grad_() for shape in (queries, keys, keys))
        results = {
            "": queries,
            "mean": (problem.batch, queries[2], problem.length),
            "each": (*queries[:3], problem.length),
        }
        dout = _random(*results[problem.weights]) if problem.backward else torch.empty(0)
        dense = None
        if problem.bias == "dense":
            dense = _random(1, problem.heads, problem.length, problem.length)
            if problem.causal:
                dense.masked_fill_(_ahead(problem), float("-inf"))
            dense.requires_grad_()
        steps = torch.arange(problem.batch, device="cuda") / max(1, problem.batch - 1)
        shares = 1.0 - 0.5 * steps if problem.padded else torch.ones_like(steps)
        table = torch.randn(NUM_BUCKETS, problem.heads, device="cuda").requires_grad_()
        return cls(query, key, value, dout, table, dense, (problem.length * shares).long())

    def widened(self) -> "Inputs":
        """The same numbers in float64."""
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Inputs(
            *(
                tensor if tensor is None or not tensor.is_floating_point()
                else tensor.detach().double().requires_grad_(tensor.requires_grad)
                for tensor in tensors
            )
        )  # fmt: skip

    def leaves(self, problem: Problem) -> list[Tensor]:
        learned = {"t5": self.table, "dense": self.dense, "": None}[problem.bias]
        first = [self.query, self.key] if problem.weights else [self.query, self.key, self.value]
        return first if learned is None else [*first, learned]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def _ahead(problem: Problem) -> Tensor:
    """``(T, T)``: which keys lie ahead of a query."""
    size = (problem.length, problem.length)
    return torch.ones(size, device="cuda", dtype=torch.bool).triu(1)


Run = Callable[[Inputs], Tensor]
Maker = Callable[[Problem], Run]


def results_of(problem: Problem, run: Run, inputs: Inputs) -> list[Tensor]:
    """The output and, of a problem with gradients, those of all leaves."""
    if not problem.backward:
        with torch.no_grad():
            return [run(inputs)]
    out = run(inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs.leaves(problem), inputs.dout)]


Expected = tuple[Tensor, Tensor]
"""A result in float64, and as the reference has it in the dtype of the inputs."""


def expected_of(problem: Problem, inputs: Inputs) -> list[Expected]:
    """What `results_of` should be."""
    reference = zeta(problem, "reference")
    wide, low = (results_of(problem, reference, each) for each in (inputs.widened(), inputs))
    return list(zip(wide, low, strict=True))


def fault(results: Iterable[Tensor], expected: Iterable[Expected], margin: float) -> str:
    """Why results are wrong, or nothing."""
    for place, (got, (want, low)) in enumerate(zip(results, expected, strict=True)):
        error, allowed = (
            ((tensor.double() - want).norm() / want.norm()).item() for tensor in (got, low)
        )
        if not error <= 2 * allowed + margin:
            return f"result {place} is off by {error:.1e}, the reference by {allowed:.1e}"
    return ""


def zeta(problem: Problem, backend: str = "triton") -> Run:
    """Zeta's op on a named backend."""

    def run(inputs: Inputs) -> Tensor:
        mask: masks.Mask | None = masks.Causal() if problem.causal else None
        if problem.padded:
            padding = masks.Padding(inputs.lengths)
            mask = padding if mask is None else mask & padding
        bias: biases.Bias | None = None
        if problem.bias == "t5":
            bias = biases.Bucketed(inputs.table, bidirectional=not problem.causal)
        elif inputs.dense is not None and problem.bias == "dense":
            bias = biases.Dense(inputs.dense)
        if problem.weights:
            reduce = "mean" if problem.weights == "mean" else None
            return attention_weights(
                inputs.query, inputs.key, mask=mask, bias=bias, reduce=reduce, backend=backend
            )
        seed = 1 if problem.dropout_p else None
        return attention(
            inputs.query, inputs.key, inputs.value, mask=mask, bias=bias,
            dropout_p=problem.dropout_p, seed=seed, backend=backend,
        )  # fmt: skip

    return run


def _adder(problem: Problem) -> Callable[[Inputs], Tensor | None]:
    """What gives bias and mask as torch's kernels take them, as one dense tensor: buckets, and what
    lies ahead, are found beforehand.
    """
    if problem.bias == "t5":
        position = torch.arange(problem.length, device="cuda")
        buckets = _buckets(problem, position - position[:, None])
        ahead = _ahead(problem) if problem.causal else None

    def added(inputs: Inputs) -> Tensor | None:
        found = inputs.dense if problem.bias == "dense" else None
        if problem.bias == "t5":
            values_TSH = F.embedding(buckets, inputs.table.to(inputs.query.dtype))
            found = values_TSH.permute(2, 0, 1)[None].contiguous()
            if ahead is not None:
                found = found.masked_fill(ahead, float("-inf"))
        if problem.padded:
            assert found is not None
            hidden = torch.arange(problem.length, device="cuda") >= inputs.lengths[:, None]
            found = found.masked_fill(hidden[:, None, None, :], float("-inf"))
        return found

    return added


def _buckets(problem: Problem, offset: Tensor) -> Tensor:
    return t5_buckets(
        offset, bidirectional=not problem.causal, num_buckets=NUM_BUCKETS, max_distance=128
    )


def sdpa(problem: Problem) -> Run:
    """`F.scaled_dot_product_attention` by its own choice of kernel: a table is looked up in each
    call, a dense bias given as it is.
    """
    added = _adder(problem)

    def run(inputs: Inputs) -> Tensor:
        mask = added(inputs)
        return F.scaled_dot_product_attention(
            inputs.query, inputs.key, inputs.value, attn_mask=mask,
            is_causal=problem.causal and mask is None, dropout_p=problem.dropout_p,
            enable_gqa=bool(problem.key_heads),
        )  # fmt: skip

    return run


def cudnn(problem: Problem) -> Run:
    """The same by cuDNN."""
    chosen = sdpa(problem)

    def run(inputs: Inputs) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return chosen(inputs)

    return run


def flex(problem: Problem) -> Run:
    """Compiled FlexAttention: the table is read in its score function, masks are block masks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    offset = torch.arange(-problem.length, problem.length + 1, device="cuda")
    buckets = _buckets(problem, offset)
    made: dict[str, Any] = {}

    def run(inputs: Inputs) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s + inputs.table[buckets[k - q + problem.length], h]

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = k < inputs.lengths[b] if problem.padded else k >= 0
            return seen & (q >= k) if problem.causal else seen

        if "mask" not in made:
            block = problem.causal or problem.padded
            batch = problem.batch if problem.padded else None
            made["mask"] = block and create_block_mask(
                visible, batch, None, problem.length, problem.length, device="cuda"
            )
        return compiled(
            inputs.query, inputs.key, inputs.value, block_mask=made["mask"] or None,
            score_mod=score if problem.bias == "t5" else None,
            # With its own choice of stages it asks for more shared memory than a H200 has.
            kernel_options={"num_stages": 2},
        )  # fmt: skip

    return run


def eager_weights(problem: Problem) -> Run:
    """Weights as `torch.nn.MultiheadAttention` makes them: of all heads as one batch, with a mask
    that is ready, then their mean.
    """
    mask = None
    if problem.causal:
        mask = torch.zeros(1, problem.length, problem.length, device="cuda", dtype=DTYPE)
        mask.masked_fill_(_ahead(problem), float("-inf"))

    def run(inputs: Inputs) -> Tensor:
        query = (inputs.query * problem.dim**-0.5).flatten(0, 1)
        key = inputs.key.flatten(0, 1).mT
        scores = torch.bmm(query, key) if mask is None else torch.baddbmm(mask, query, key)
        weights = torch.softmax(scores, dim=-1).unflatten(0, (problem.batch, problem.heads))
        result: Tensor = weights.mean(1) if problem.weights == "mean" else weights
        return result

    return run


def compiled_weights(problem: Problem) -> Run:
    """The same, compiled."""
    return torch.compile(eager_weights(problem), dynamic=False)
