"""Operators of plain calls go straight to the library too: the same bits, laid out the same."""

import pytest
import torch
from torch import Tensor

from tests.ops.cpu.plain_calls import KINDS, SHAPES, operands, scores_of
from zeta import masks
from zeta.ops.backends.cpu import library, operators, plain
from zeta.ops.backends.cpu.description import Fixed
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import lower

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle()))

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def lowered(call: AttentionCall) -> tuple[Inputs, Fixed]:
    parts = lower(call)
    inputs = (call.query, call.key, call.value, parts.offsets, parts.dense)
    return inputs, Fixed(*parts.fixed(), False)


def results(inputs: Inputs, fixed: Fixed) -> list[Tensor]:
    """Output, log-sum-exp and every gradient."""
    *_, offsets, dense = inputs
    out, lse = operators.attention(*inputs, *fixed)
    saved = (*inputs[:3], out, lse, offsets, dense)
    needed = (offsets is not None, dense is not None)
    return [out, lse, *operators.attention_backward(out, None, *saved, *fixed, *needed)]


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = operands(name, dtype, inside)
    mask, bias = scores_of(kinds, made)
    call = AttentionCall.checked(*made, mask=mask, bias=bias, dropout_p=0.2, seed=4)
    inputs, fixed = lowered(call)
    assert plain.forward(*inputs, fixed) is not None
    found = results(inputs, fixed)
    monkeypatch.setattr(library.load(), "direct", None)
    assert plain.forward(*inputs, fixed) is None
    for tensor, expected in zip(found, results(inputs, fixed), strict=True):
        assert torch.equal(tensor, expected)
        assert tensor.stride() == expected.stride()
        assert tensor.dtype == expected.dtype


def test_what_is_not_plain_takes_the_longer_way() -> None:
    made = operands("blocks")
    batch, length = made[0].shape[0], made[1].shape[2]
    for mask in (
        masks.PrefixLM(torch.full((batch,), 3)),
        masks.Documents(torch.zeros(batch, length, dtype=torch.int64)),
    ):
        inputs, fixed = lowered(AttentionCall.checked(*made, mask=mask))
        assert plain.forward(*inputs, fixed) is None
    inputs, fixed = lowered(
        AttentionCall.checked(*made, query_positions=torch.arange(10, 10 + made[0].shape[2]))
    )
    assert plain.forward(*inputs, fixed) is None
    inputs, fixed = lowered(AttentionCall.checked(*made))
    negated = torch.complex(made[0], made[0]).conj().imag
    assert negated.is_neg()
    assert plain.forward(negated, *inputs[1:], fixed) is None
    torch.testing.assert_close(
        operators.attention(negated, *inputs[1:], *fixed),
        operators.attention(-made[0], *inputs[1:], *fixed),
    )
