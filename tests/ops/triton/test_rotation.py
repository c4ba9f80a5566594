"""The kernel of rotations in Triton's interpreter, against the textbook in float64."""

import os

import pytest
import torch
from torch import Tensor

from tests.ops.rotations import MODULES, TURNINGS, Turning, run_of_module, wrongly_turned
from zeta.ops import rotation as choice
from zeta.ops.backends.triton import rotation
from zeta.positions import rotary_tables, rotate

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
    ),
    # Of numpy: the interpreter makes scalars of arrays.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _id(turning: Turning) -> str:
    return turning.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turning", TURNINGS, ids=_id)
def test_results_and_gradients(turning: Turning, dtype: torch.dtype) -> None:
    turning.check(rotation.rotated, dtype)


def test_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "TILE", 64)
    Turning("tiles", length=11, heads=6, key_heads=3).check(rotation.rotated, torch.float32)
    Turning("tiles of halves", length=11, interleaved=False, head_dim=18).check(
        rotation.rotated, torch.float16
    )


def test_wrong_numbers_are_found() -> None:
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        TURNINGS[0].check(wrongly_turned(rotation.rotated), torch.float32)


def _leaves() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    query = torch.randn(2, 4, 5, 8, requires_grad=True)
    key = torch.randn(2, 2, 5, 8, requires_grad=True)
    return query, key, rotary_tables(torch.arange(5), 8)


def test_one_of_both_gradients() -> None:
    query, key, table = _leaves()
    turned = rotation.rotated(query, key, (*table, *table), True)
    for index, leaf in enumerate((query, key)):
        (found,) = torch.autograd.grad(turned[index].sum(), leaf, retain_graph=True)
        (expected,) = torch.autograd.grad(rotate(leaf, *table).sum(), leaf)
        torch.testing.assert_close(found, expected)
    alone, _ = rotation.rotated(key, None, table, False)
    assert torch.equal(alone, rotate(key, *table, interleaved=False))
    (found,) = torch.autograd.grad(alone.sum(), key)
    (expected,) = torch.autograd.grad(rotate(key, *table, interleaved=False).sum(), key)
    torch.testing.assert_close(found, expected)


def test_it_can_be_differentiated_twice() -> None:
    query, key, table = _leaves()

    def penalty(turned: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad((turned**3).sum(), query, create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), query)[0]

    found = penalty(rotation.rotated(query, key, (*table, *table), True)[0])
    torch.testing.assert_close(found, penalty(rotate(query, *table)))


@pytest.mark.parametrize("eager", [True, False])
def test_many_gradients_at_once(eager: bool) -> None:
    query, key, table = _leaves()
    tables = [*table, *table]
    if eager:
        turned = rotation.rotated(query, key, tables, True)
    else:
        turned = rotation.rotation(query, key, tables, True, False)
    for outputs, leaves in ((turned, (query, key)), (turned[:1], (query,)), (turned[1:], (key,))):
        many = [torch.randn(3, *output.shape) for output in outputs]
        found = torch.autograd.grad(outputs, leaves, many, retain_graph=True, is_grads_batched=True)
        for leaf, batch, incoming in zip(leaves, found, many, strict=True):
            plain = rotate(leaf, *table)
            for got, one in zip(batch, incoming, strict=True):
                (expected,) = torch.autograd.grad(plain, leaf, one, retain_graph=True)
                torch.testing.assert_close(got, expected)


def test_results_are_laid_out_as_what_was_turned() -> None:
    query, key, table = _leaves()
    inside = query.detach().transpose(1, 2).contiguous().transpose(1, 2)
    turned, turned_key = rotation.rotated(inside, key, (*table, *table), True)
    assert turned.stride() == inside.stride()
    assert turned_key.stride() == key.stride()


def test_the_operator_keeps_the_contract_of_torch_library() -> None:
    query, key, table = _leaves()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for arguments in ((query, key, (*table, *table)), (query, None, table)):
        torch.library.opcheck(
            rotation.rotation.overload, (*arguments, True, False), test_utils=checks
        )


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [True, False])
def test_it_is_one_graph_under_compile(interleaved: bool) -> None:
    query, key, table = _leaves()

    def run(query: Tensor, key: Tensor) -> Tensor:
        first, second = rotation.rotated(query, key, (*table, *table), interleaved)
        return first.sum(1) + (second**2).sum(1)

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(query, key)
    expected = run(query, key)
    torch.testing.assert_close(found, expected)
    for got, want in zip(
        torch.autograd.grad(found.sum(), (query, key)),
        torch.autograd.grad(expected.sum(), (query, key)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", MODULES)
def test_modules_take_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it and without, a module computes the same, and it is used."""
    run, calls = run_of_module(kind), []
    rotated = rotation.rotated

    def counted(*arguments: object) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        return rotated(*arguments)  # type: ignore[arg-type]  # as they came

    for options in ({}, {"positions": torch.tensor([[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]])}):
        expected = run(**options)
        with monkeypatch.context() as patch:
            patch.setattr(choice, "kernel_for", lambda tensors, tables: counted)
            actual = run(**options)
        for found, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(found, wanted)
    assert len(calls) == 2
