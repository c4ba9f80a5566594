"""An instruction set hands on what another has code for, so that neither is tested twice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.cases import Case
from tests.ops.cpu import units
from tests.ops.cpu.caches import CACHES
from tests.ops.cpu.layers import PROJECTIONS

Results = dict[str, Tensor]
HALF = (torch.bfloat16, torch.float16)
# Past what is decoded, so that every pass has its part.
CASE = Case("tiled", target=150, source=170, head_dim=40, value_dim=72, key_heads=2, batch=1)


def few_rows(dtype: torch.dtype) -> Results:
    """All queries of a few rows over caches of every form, and all linear layers."""
    found = {}
    for cache in CACHES:
        made = cache.run(cache.tensors(dtype))
        found |= {f"{cache.name}, {name}": tensor for name, tensor in made.items()}
    for layers in PROJECTIONS:
        made = layers.run(*layers.tensors(dtype))
        found |= {f"{layers.name}, {name}": tensor for name, tensor in made.items()}
    return found


def many_rows(dtype: torch.dtype) -> Results:
    """Outputs, gradients and weights."""
    made = CASE.tensors(dtype)
    found = CASE.run(made, "cpu") | CASE.run_both(made, "cpu", None)
    return found | {"mean": CASE.run_weights(made, "cpu", "mean")["weights"]}


def _id(value: object) -> str:
    return getattr(value, "__name__", str(value))


def different(first: Results, second: Results) -> set[str]:
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Results]:
    """What calls make on an instruction set of the library that has all of them."""

    def on(unit: str, run: Callable[[torch.dtype], Results], dtype: torch.dtype) -> Results:
        with monkeypatch.context() as patch:
            units.use(unit, patch, emulated=True)
            return run(dtype)

    return on


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_tiles_leave_few_rows_to_dot_products(
    dtype: torch.dtype, results: Callable[..., Results]
) -> None:
    tiles, dots = (results(unit, few_rows, dtype) for unit in ("AMX", "AVX-512 BF16"))
    assert different(tiles, dots) == set()


@pytest.mark.slow
@pytest.mark.parametrize("run", [few_rows, many_rows], ids=_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dot_products_leave_all_but_bfloat16_to_avx512(
    dtype: torch.dtype,
    run: Callable[[torch.dtype], Results],
    results: Callable[..., Results],
) -> None:
    dots, without = (results(unit, run, dtype) for unit in ("AVX-512 BF16", "AVX-512"))
    assert different(dots, without) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "run", "dtype"),
    [
        ("AVX2", "AVX-512", few_rows, torch.float32),
        ("AVX2", "AVX-512", many_rows, torch.float32),
        ("AVX-512", "AVX-512 BF16", few_rows, torch.bfloat16),
        ("AVX-512", "AVX-512 BF16", many_rows, torch.bfloat16),
        ("AVX-512 BF16", "AMX", many_rows, torch.bfloat16),
        ("AVX-512", "AMX", many_rows, torch.float32),
        ("AVX-512", "AMX", many_rows, torch.float16),
    ],
    ids=_id,
)
def test_code_of_its_own_shows_in_the_last_bits(
    first: str,
    second: str,
    run: Callable[[torch.dtype], Results],
    dtype: torch.dtype,
    results: Callable[..., Results],
) -> None:
    """Sums are made in another order: what was asked for is what ran."""
    assert different(results(first, run, dtype), results(second, run, dtype))
