"""NaN that somebody sees comes out of the native kernels wherever it belongs."""

import pytest
import torch
from torch import Tensor

from tests.ops.cpu import units
from zeta import attention, biases, masks
from zeta.ops.backends.cpu import library

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle()))

SOURCE = 80
NAMES = ("query", "key", "value")
KINDS = {
    "plain": {},
    "softcap": {"bias": biases.Softcap(3.0)},
    "dropout": {"dropout_p": 0.3, "seed": 3},
}


def visible(rows: int) -> Tensor:
    """Which key each query sees: queries are the last positions."""
    return torch.ones(rows, SOURCE, dtype=torch.bool).tril(SOURCE - rows)


def planted(name: str, rows: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Operands with one NaN in their first head, and the rows that it reaches."""
    lengths = {"query": rows, "key": SOURCE, "value": SOURCE}
    made = {kind: torch.randn(1, 2, length, 16).to(dtype) for kind, length in lengths.items()}
    at = rows // 2 if name == "query" else SOURCE - (rows + 1) // 2
    made[name][0, 0, at, 3] = float("nan")
    leaves = {kind: tensor.requires_grad_() for kind, tensor in made.items()}
    return leaves, torch.arange(rows) == at if name == "query" else visible(rows)[:, at]


def nans(leaves: dict[str, Tensor], backend: str, kind: str) -> dict[str, Tensor]:
    """Where the output and the gradients are NaN."""
    out = attention(*leaves.values(), mask=masks.Causal(), backend=backend, **KINDS[kind])  # type: ignore[arg-type]
    gradients = torch.autograd.grad(out.float().sum(), list(leaves.values()))
    return {"out": out.isnan()} | {
        name: grad.isnan() for name, grad in zip(NAMES, gradients, strict=True)
    }


@pytest.mark.usefixtures("unit")
@units.on_each(units.ALL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("name", NAMES)
def test_it_reaches_whom_it_should(name: str, rows: int, kind: str, dtype: torch.dtype) -> None:
    leaves, reached = planted(name, rows, dtype)
    found, wanted = nans(leaves, "cpu", kind), nans(leaves, "reference", kind)
    # The reference gives 0 x NaN to rows and keys that do not see each other; the kernel need not.
    seen = visible(rows)[reached].any(0)
    pairs = {"out": reached, "query": reached, "key": seen, "value": seen}
    for result, where in found.items():
        must = wanted[result][0, 0] & pairs[result][:, None]
        assert must.any() or (name, result) == ("value", "value")
        assert bool(where[0, 0][must].all()), result
        assert not where[:, 1].any(), result
    for result in ("out", "query"):
        assert not (found[result] & ~wanted[result]).any(), result
