"""Calls cut along their keys: the parts merge to the whole, and nothing is copied."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.ops import cases
from tests.ops.cases import Case
from zeta import biases, masks
from zeta.ops.attention import run
from zeta.ops.call import AttentionCall
from zeta.ops.parts import Indivisible, Part, keys_of

# Long ones test backends, not cuts.
CASES = [case for case in cases.CASES if case.source <= 40 and case.target <= 40]


def made_call(case: Case) -> tuple[AttentionCall, cases.Made]:
    made = case.tensors(torch.float64)
    operands = made["query"], made["key"], made["value"]
    return AttentionCall.checked(*operands, result="lse", **case.arguments(made)), made


def merged(call: AttentionCall, cuts: list[Part]) -> tuple[Tensor, Tensor]:
    """By the definition of the log-sum-exp."""
    outs, lses = zip(*(run(keys_of(call, cut), "reference") for cut in cuts), strict=True)
    total = torch.stack(lses).exp().sum(0).log()
    shares = [(lse - total.clamp(min=-1e300)).exp().unsqueeze(-1) for lse in lses]
    return sum(share * out for share, out in zip(shares, outs, strict=True)), total


def with_gradients(out: Tensor, lse: Tensor, made: cases.Made) -> list[Tensor]:
    coefficients = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    loss = (out * coefficients).sum() + lse[lse.isfinite()].square().sum()
    return [out, lse, *torch.autograd.grad(loss, list(made.values()))]


def halves(source: int) -> list[Part]:
    middle = source // 2
    return [slice(0, middle), slice(middle, source)] if middle else [slice(None)]


def has_empty_part(call: AttentionCall, cuts: list[Part]) -> bool:
    """Where `merged`, which is no more than the definition, has no gradient."""
    return any(bool(run(keys_of(call, cut), "reference")[1].isinf().any()) for cut in cuts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parts_merge_to_the_whole(case: Case) -> None:
    call, made = made_call(case)
    every = torch.arange(case.source)
    cuts: dict[str, list[Part]] = {
        "slices": halves(case.source),
        "every other": [slice(0, None, 2), slice(1, None, 2)] if case.source > 1 else [every],
        "indices": [every.flip(0)],
    }
    out, lse = run(call, "reference")
    for name, parts in cuts.items():
        found = merged(call, parts)
        torch.testing.assert_close(found[0], out, msg=name)
        torch.testing.assert_close(found[1], lse, msg=name)
        if not has_empty_part(call, parts):
            torch.testing.assert_close(
                with_gradients(*found, made), with_gradients(*run(call, "reference"), made)
            )


def test_every_kind_of_value_is_among_the_cases() -> None:
    kinds = set()
    for case in CASES:
        call, _ = made_call(case)
        values = (*masks.conjuncts(call.mask), *biases.summands(call.bias))
        kinds |= {type(value) for value in values} | {"dropout" for _ in [0] if case.dropout_p}
    assert kinds >= {
        masks.Causal, masks.SlidingWindow, masks.PrefixLM, masks.Documents, masks.Padding,
        masks.Dense, masks.AnyOf, biases.Dense, biases.Bucketed, biases.Alibi, biases.Softcap,
        "dropout",
    }  # fmt: skip


def test_another_cut_is_told_from_the_right_one() -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64).unbind()
    call = AttentionCall.checked(query, key, value, mask=masks.Causal(), result="lse")
    whole = run(call, "reference")[0]
    torch.testing.assert_close(merged(call, halves(6))[0], whole)
    for wrong in ([slice(0, 3), slice(2, 6)], [slice(0, 3), slice(4, 6)]):
        assert (merged(call, wrong)[0] - whole).abs().max() > 1e-3
    late = dataclasses.replace(keys_of(call, slice(3, 6)), key_positions=None)
    assert not torch.equal(run(late)[0], run(keys_of(call, slice(3, 6)))[0])


def test_a_slice_is_read_where_it_is() -> None:
    query, keys = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 10, 4)
    hidden, added = torch.rand(1, 1, 1, 10) < 0.5, torch.randn(1, 2, 1, 10)
    bias = biases.Dense(added) + biases.Softcap(5.0)
    call = AttentionCall.checked(query, keys, keys, mask=masks.keep(hidden), bias=bias)
    part = keys_of(call, slice(3, 8))
    assert part.key is part.value
    assert part.key.data_ptr() == keys[:, :, 3].data_ptr()
    assert part.key.stride() == keys.stride()
    assert isinstance(part.mask, masks.Dense)
    assert part.mask.tensor.data_ptr() == hidden[..., 3].data_ptr()
    # Nothing reads them.
    assert part.query_positions is part.key_positions is None


def test_positions_are_kept() -> None:
    query, keys = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 10, 4)
    call = AttentionCall.checked(query, keys, keys, mask=masks.Causal())
    part = keys_of(call, slice(3, 8))
    assert part.query_positions is not None
    assert part.key_positions is not None
    assert part.query_positions.tolist() == [[8, 9]]
    assert part.key_positions.tolist() == [[3, 4, 5, 6, 7]]
    again = keys_of(part, torch.tensor([4, 0]))
    assert again.key_positions is not None
    assert again.key_positions.tolist() == [[7, 3]]
    assert torch.equal(again.key, keys[:, :, [7, 3]])


@dataclasses.dataclass(frozen=True, eq=False)
class First(masks.Mask):
    """A user's own."""

    def visible(self, tile: object) -> Tensor:
        raise AssertionError("not asked")


def test_a_mask_of_unknown_kind_cannot_be_cut() -> None:
    query = torch.randn(1, 2, 6, 4)
    call = AttentionCall.checked(query, query, query, mask=First())
    with pytest.raises(Indivisible, match="a First cannot be cut"):
        keys_of(call, slice(0, 3))
