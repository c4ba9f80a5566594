"""Calls on fresh leaves with all results and gradients, for the tests of the chunked backend."""

import torch
from torch import Tensor

from zeta import biases
from zeta.ops.call import AttentionCall

Results = dict[str, Tensor]


def make(
    target: int = 190,
    source: int = 201,
    heads: int = 4,
    key_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    head_dim: int = 8,
) -> Results:
    """Fresh leaves for two sequences."""
    shapes = {
        "query": (2, heads, target, head_dim),
        "key": (2, key_heads, source, head_dim),
        "value": (2, key_heads, source, head_dim + 3),
        "table": (12, heads),
    }
    return {
        name: torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def bucketed(made: Results) -> biases.Bucketed:
    return biases.Bucketed(made["table"], max_distance=20)


def outcome(
    backend: object, made: Results, *, bias: biases.Bias | None = None, **arguments: object
) -> Results:
    """Output, log-sum-exp, and gradients of all leaves through both."""
    leaves = {name: leaf for name, leaf in made.items() if bias is not None or name != "table"}
    call = AttentionCall.checked(
        made["query"], made["key"], made["value"], bias=bias, result="lse", **arguments
    )
    out, lse = backend.run(call)
    return {"out": out, "lse": lse} | gradients([out, lse.nan_to_num(neginf=0.0)], leaves)


def outcome_of_weights(
    backend: object,
    made: Results,
    result: str,
    *,
    bias: biases.Bias | None = None,
    **arguments: object,
) -> Results:
    """Weights, and gradients of the leaves they depend on."""
    used = ("query", "key") if bias is None else ("query", "key", "table")
    call = AttentionCall.checked(
        made["query"], made["key"], made["value"], bias=bias, result=result, **arguments
    )
    weights = backend.weights(call)
    return {"weights": weights} | gradients([weights], {name: made[name] for name in used})


def gradients(results: list[Tensor], leaves: Results) -> Results:
    generator = torch.Generator().manual_seed(0)
    grads = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results
    ]
    found = torch.autograd.grad(results, list(leaves.values()), grads)
    return {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True)}


def assert_same(actual: Results, expected: Results, tolerance: float = 1e-11) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
