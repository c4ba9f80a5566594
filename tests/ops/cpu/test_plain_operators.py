"""The operators' kernels in C: the bits of Python's, laid out the same; what they leave to it."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cpu.plain_calls import KINDS, SHAPES, operands, scores_of
from zeta import masks
from zeta.ops.backends.cpu import library, operators, passes
from zeta.ops.backends.cpu.description import Fixed
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import lower

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle()))

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
IN_C, IN_PYTHON = "kernel", "python"


def lowered(call: AttentionCall) -> tuple[Inputs, Fixed]:
    parts = lower(call)
    inputs = (call.query, call.key, call.value, parts.offsets, parts.dense)
    return inputs, Fixed(*parts.fixed(), False)


def results(inputs: Inputs, fixed: Fixed, kernel: str) -> list[Tensor]:
    """Output, log-sum-exp and every gradient."""
    *_, offsets, dense = inputs
    forward = getattr(torch.ops.zeta, f"cpu_attention_{kernel}")
    backward = getattr(torch.ops.zeta, f"cpu_attention_backward_{kernel}")
    out, lse = forward(*inputs, *fixed)
    saved = (*inputs[:3], out, lse, offsets, dense)
    needed = (offsets is not None, dense is not None)
    return [out, lse, *backward(out, None, *saved, *fixed, *needed)]


@pytest.fixture
def calls_of_python(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that Python ran, as they come."""
    found: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        run = getattr(passes, name)

        def noting(*arguments: Any) -> Any:
            found.append(name)
            return run(*arguments)

        return noting

    for name in ("forward", "backward"):
        monkeypatch.setattr(passes, name, noted(name))
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_at_the_same_places(
    name: str,
    dtype: torch.dtype,
    kinds: tuple[str, str],
    inside: bool,
    calls_of_python: list[str],
) -> None:
    made = operands(name, dtype, inside)
    mask, bias = scores_of(kinds, made)
    call = AttentionCall.checked(*made, mask=mask, bias=bias, dropout_p=0.2, seed=4)
    inputs, fixed = lowered(call)
    found = results(inputs, fixed, IN_C)
    # The gradient of a dense bias in float32 alone.
    in_half = inputs[4] is not None and inputs[4].dtype != torch.float32
    assert calls_of_python == (["backward"] if in_half else [])
    expected = results(inputs, fixed, IN_PYTHON)
    assert calls_of_python[-2:] == ["forward", "backward"]
    for tensor, of_python in zip(found, expected, strict=True):
        assert torch.equal(tensor, of_python)
        assert tensor.stride() == of_python.stride()
        assert tensor.dtype == of_python.dtype


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["prefix", "documents", "positions", "positions of each"])
def test_the_same_bits_of_what_only_operators_take(
    kind: str, name: str, calls_of_python: list[str]
) -> None:
    made = operands(name)
    batch, target, source = made[0].shape[0], made[0].shape[2], made[1].shape[2]
    arguments: dict[str, Any] = {"dropout_p": 0.2, "seed": 4, "mask": masks.Causal()}
    if kind == "prefix":
        arguments["mask"] = masks.PrefixLM(torch.arange(1, batch + 1))
    elif kind == "documents":
        ids = torch.arange(max(target, source)).div(3, rounding_mode="floor")
        arguments["mask"] = masks.Documents(ids.expand(batch, -1))
    else:
        rows = 1 if kind == "positions" else batch
        starts = torch.arange(rows)[:, None]
        arguments["query_positions"] = starts + torch.arange(source, source + target)
        arguments["key_positions"] = (starts + torch.arange(source)).flip(1)
    inputs, fixed = lowered(AttentionCall.checked(*made, **arguments))
    found = results(inputs, fixed, IN_C)
    assert calls_of_python == []
    for tensor, of_python in zip(found, results(inputs, fixed, IN_PYTHON), strict=True):
        assert torch.equal(tensor, of_python)
        assert tensor.stride() == of_python.stride()


def test_what_is_not_plain_is_for_python(calls_of_python: list[str]) -> None:
    made = operands("blocks")
    of_int32 = masks.PrefixLM(torch.ones(made[0].shape[0], dtype=torch.int32))
    inputs, fixed = lowered(AttentionCall.checked(*made))
    spread = made[0].mT.contiguous().mT
    narrow = (*inputs[:2], made[2][..., :3], None, None)
    not_plain = [
        lowered(AttentionCall.checked(*made, mask=of_int32)),
        ((spread, *inputs[1:]), fixed),
        (narrow, fixed),
    ]
    for given, numbers in not_plain:
        calls_of_python.clear()
        found = torch.ops.zeta.cpu_attention_kernel(*given, *numbers)
        assert calls_of_python == ["forward"]
        expected = passes.forward(*given, numbers)
        assert all(map(torch.equal, found, expected))
    out, lse = torch.ops.zeta.cpu_attention_kernel(*inputs, *fixed)
    saved = (*made, out, lse)
    for grad_out, grad_lse in ((torch.ones(()).expand_as(out), None), (out, lse)):
        calls_of_python.clear()
        gradients = torch.ops.zeta.cpu_attention_backward_kernel(
            grad_out, grad_lse, *saved, None, None, *fixed, False, False
        )
        assert calls_of_python == ["backward"]
        of_python = passes.backward(grad_out, grad_lse, saved, None, None, fixed, (False, False))
        assert all(map(torch.equal, gradients, of_python[:3]))


LABELS = torch.zeros(2, 9, dtype=torch.int64)
WRONG: dict[str, tuple[int, Tensor]] = {
    "a prefix of another batch": (1, LABELS[0, :3]),
    "a prefix in int32": (1, LABELS[0, :2].int()),
    "documents of queries alone": (3, LABELS),
    "positions of keys alone": (7, LABELS.int()),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_kernel_refuses_labels_that_it_cannot_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("left to Python")

    monkeypatch.setattr(passes, "forward", refused)
    made = [torch.randn(2, 2, 9, 16) for _ in range(3)]
    place, tensor = WRONG[name]
    tensors = [tensor if place == other else None for other in range(9)]
    with pytest.raises(RuntimeError, match=r"left to Python|failed, as logged above"):
        torch.ops.zeta.cpu_attention_kernel(
            *made, None, None, tensors, 0.25, False, 0, 0.0, False, 0.0, False
        )


def test_what_is_negated_on_paper_is_seen() -> None:
    made = operands("blocks")
    inputs, fixed = lowered(AttentionCall.checked(*made))
    negated = torch.complex(made[0], made[0]).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(
        operators.attention(negated, *inputs[1:], *fixed),
        operators.attention(-made[0], *inputs[1:], *fixed),
    )


def test_an_error_of_python_is_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise MemoryError("no room for it")

    monkeypatch.setattr(passes, "forward", failing)
    made = operands("blocks")
    inputs, fixed = lowered(AttentionCall.checked(*made))
    inputs = (made[0].mT.contiguous().mT, *inputs[1:])
    with pytest.raises(RuntimeError, match=r"no room for it|failed, as logged above"):
        torch.ops.zeta.cpu_attention_kernel(*inputs, *fixed)


def owners(tensors: Iterable[Tensor]) -> list[int]:
    """How many hold each of them."""
    # Torch has it, and gives it no type.
    return [tensor._use_count() for tensor in tensors]  # type: ignore[attr-defined]


def test_nothing_is_kept() -> None:
    """Neither what an operator is given nor what it gives, whichever kernel runs."""
    made = operands("blocks")
    padding = masks.Padding(torch.full((made[0].shape[0],), 5))
    for query in (made[0], made[0].mT.contiguous().mT):
        call = AttentionCall.checked(query, *made[1:], mask=padding, dropout_p=0.1, seed=1)
        inputs, fixed = lowered(call)
        for _ in range(2):
            results(inputs, fixed, IN_C)
        given = (*inputs[:3], *(tensor for tensor in fixed.tensors if tensor is not None))
        before = owners(given)
        found = results(inputs, fixed, IN_C)
        assert owners(given) == before
        assert all(number == 1 for number in owners(found))


def test_beside_a_torch_without_its_c_interface_python_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "_TORCH_FUNCTIONS", ("of_another_time",))
    assert not library.register_operators.__wrapped__()
