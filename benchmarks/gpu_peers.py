"""What the GPU kernels are measured against: the same functions by torch's own means.

Shape suffixes: B batch, H heads, T queries, S keys, D head dimension.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zeta import attention, attention_weights, biases, masks
from zeta.positions import t5_buckets

NUM_BUCKETS = 32


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: sizes, and what is done to the scores.

    Attributes:
        bias: "" for none, "t5" for a learned table, "dense" for a learned ``(1, H, T, T)``.
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
        """The same in little, for a check against float64 of the same compiled kernels."""
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
    def of(cls, problem: Problem, dtype: torch.dtype = torch.bfloat16) -> "Inputs":
        queries = (problem.batch, problem.heads, problem.queries or problem.length, problem.dim)
        keys = (problem.batch, problem.key_heads or problem.heads, problem.length, problem.dim)
        query, key, value, dout = (
            torch.randn(shape, device="cuda", dtype=dtype)
            for shape in (queries, keys, keys, queries)
        )
        if problem.weights:
            dout = torch.empty(0)
        dense = None
        if problem.bias == "dense":
            scores = (1, problem.heads, problem.length, problem.length)
            dense = torch.randn(scores, device="cuda", dtype=dtype).requires_grad_()
        steps = torch.arange(problem.batch, device="cuda") / max(1, problem.batch - 1)
        lengths = (problem.length * (1.0 - 0.5 * steps)).long() if problem.padded else None
        return cls(
            query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), dout,
            torch.randn(NUM_BUCKETS, problem.heads, device="cuda").requires_grad_(), dense,
            torch.full((problem.batch,), problem.length, device="cuda")
            if lengths is None else lengths,
        )  # fmt: skip

    def leaves(self, problem: Problem) -> list[Tensor]:
        learned = {"t5": [self.table], "dense": [self.dense], "": []}[problem.bias]
        first = [self.query, self.key] if problem.weights else [self.query, self.key, self.value]
        return first + [tensor for tensor in learned if tensor is not None]


Run = Callable[[Inputs], Tensor]


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


def _added(problem: Problem, inputs: Inputs) -> Tensor | None:
    """Bias and mask as torch's kernels take them: one dense tensor, made anew in each call."""
    added = inputs.dense if problem.bias == "dense" else None
    position = torch.arange(problem.length, device="cuda")
    offset = position - position[:, None]
    if problem.bias == "t5":
        buckets = t5_buckets(
            offset, bidirectional=not problem.causal, num_buckets=NUM_BUCKETS, max_distance=128
        )
        values_TSH = F.embedding(buckets, inputs.table.to(inputs.query.dtype))
        added = values_TSH.permute(2, 0, 1)[None].contiguous()
    if problem.causal and added is not None:
        added = added.masked_fill(offset > 0, float("-inf"))
    if problem.padded:
        hidden = position >= inputs.lengths[:, None]
        zero = torch.zeros((), device="cuda", dtype=inputs.query.dtype)
        added = (zero if added is None else added).masked_fill(
            hidden[:, None, None, :], float("-inf")
        )
    return added


def sdpa(problem: Problem, backend: SDPBackend | None = None) -> Run:
    """`F.scaled_dot_product_attention` with a dense bias, by its own choice of kernel."""

    def run(inputs: Inputs) -> Tensor:
        added = _added(problem, inputs)
        call = functools.partial(
            F.scaled_dot_product_attention, inputs.query, inputs.key, inputs.value,
            attn_mask=added, is_causal=problem.causal and added is None,
            dropout_p=problem.dropout_p, enable_gqa=bool(problem.key_heads),
        )  # fmt: skip
        if backend is None:
            return call()
        with sdpa_kernel(backend):
            return call()

    return run


def plain_cudnn(problem: Problem) -> Run:
    """cuDNN without bias, padding and dropout: the ceiling, not a peer."""
    bare = dataclasses.replace(problem, bias="", padded=False, dropout_p=0.0)
    return sdpa(bare, SDPBackend.CUDNN_ATTENTION)


def flex(problem: Problem) -> Run:
    """Compiled FlexAttention: the table is read in its score function, masks are block masks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    position = torch.arange(-problem.length, problem.length + 1, device="cuda")
    buckets = t5_buckets(
        position, bidirectional=not problem.causal, num_buckets=NUM_BUCKETS, max_distance=128
    )
    made: dict[str, object] = {}

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
        return compiled(  # type: ignore[no-any-return]
            inputs.query, inputs.key, inputs.value, block_mask=made["mask"] or None,
            score_mod=score if problem.bias == "t5" else None,
            # With its own choice of stages it asks for more shared memory than a H200 has.
            kernel_options={"num_stages": 2},
        )  # fmt: skip

    return run


def eager_weights(problem: Problem, compiled: bool) -> Run:
    """Weights as `torch.nn.MultiheadAttention` makes them: all heads at once, then their mean."""

    def run(inputs: Inputs) -> Tensor:
        added = _added(dataclasses.replace(problem), inputs)
        if problem.causal and added is None:
            size = (problem.length, problem.length)
            added = torch.full(size, float("-inf"), device="cuda", dtype=inputs.query.dtype).triu(1)
        scores = inputs.query * problem.dim**-0.5 @ inputs.key.mT
        weights = torch.softmax(scores if added is None else scores + added, dim=-1)
        return weights.mean(1) if problem.weights == "mean" else weights

    return torch.compile(run, dynamic=False) if compiled else run
