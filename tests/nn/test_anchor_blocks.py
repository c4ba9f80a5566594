"""Blocks of keys about anchors of their own: read in slices, and merged by their log-sum-exps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zeta import biases, masks
from zeta.bench import peak_bytes
from zeta.nn import XPos, anchors
from zeta.nn.anchors import Blocks
from zeta.ops.call import AttentionCall

H, D = 2, 16
LONG, SHORT = 3000, 2.0
"""Keys, and a scale base with which they are in dozens of blocks of float32."""


def long_call(dtype: torch.dtype, target: int, **options: Any) -> tuple[Blocks, AttentionCall]:
    """Queries of one block over the keys of many."""
    blocks = Blocks.of(XPos(D, SHORT), dtype)
    # In the middle of a block, where more than one query has room.
    source = LONG // (2 * blocks.half) * 2 * blocks.half + 1
    query = torch.randn(2, 2 * H, target, D).to(dtype)
    key, value = torch.randn(2, 2, H, source, D).to(dtype).unbind()
    return blocks, AttentionCall.checked(query, key, value, **options)


def about_one_anchor(blocks: Blocks, call: AttentionCall) -> Tensor:
    """In float64, of float64 copies of the keys at the anchor of the last query."""
    source = call.source
    exponents = blocks.rotation.exponents(blocks.anchors(torch.arange(source)), torch.device("cpu"))
    factor = (exponents[-1] - exponents).exp2().repeat_interleave(2, -1)
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    wide = AttentionCall.checked(
        query, key * factor, value, mask=call.mask, bias=call.bias,
        dropout_p=call.dropout_p, seed=call.seed, sinks=call.sinks,
    )  # fmt: skip
    return anchors.run(wide, "reference")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_step_beyond_the_first_block_copies_no_keys(dtype: torch.dtype, hidden: bool) -> None:
    blocks, call = long_call(dtype, 1)
    if hidden:
        mask = masks.keep(torch.rand(2, 1, 1, call.source) < 0.8)
        call = dataclasses.replace(call, mask=mask)
    with torch.no_grad():
        assert peak_bytes(lambda: blocks.run(call), "cpu") < call.key.nbytes / 4
        # The measure sees a copy where there is one.
        at = torch.arange(call.source)[None]
        placed = dataclasses.replace(call, query_positions=at[:, -1:], key_positions=at)
        assert peak_bytes(lambda: blocks.run(placed), "cpu") > call.key.nbytes


OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "plain": lambda target, source: {},
    "causal": lambda target, source: {"mask": masks.Causal()},
    "window": lambda target, source: {"mask": masks.SlidingWindow(150)},
    "window of any size": lambda target, source: {"mask": masks.SlidingWindow(2**40)},
    "padding": lambda target, source: {
        "mask": masks.Padding(torch.tensor([source // 2, source // 3]))
    },
    "padding of any size": lambda target, source: {
        "mask": masks.Padding(torch.tensor([2**40, source // 3]))
    },
    "all hidden from some": lambda target, source: {
        "mask": masks.keep(
            (torch.rand(2, 1, target, source) < 0.5) & (torch.arange(2) > 0)[:, None, None, None]
        )
    },
    "first blocks hidden": lambda target, source: {
        "mask": masks.keep(torch.arange(source) > source // 2)
    },
    "bias": lambda target, source: {
        "bias": biases.Alibi(torch.rand(2 * H)) + biases.Dense(torch.randn(2, 1, target, source))
    },
    "dropout": lambda target, source: {"dropout_p": 0.3, "seed": 5, "mask": masks.Causal()},
    "sinks": lambda target, source: {"sinks": torch.randn(2 * H)},
}


@pytest.mark.parametrize("target", [1, 9])
@pytest.mark.parametrize("name", OPTIONS)
def test_slices_merge_to_the_attention_about_one_anchor(name: str, target: int) -> None:
    source = long_call(torch.float32, 1)[1].source
    blocks, call = long_call(torch.float32, target, **OPTIONS[name](target, source))
    leaves = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    found, expected = blocks.run(call), about_one_anchor(blocks, call)
    assert len(blocks._key_blocks(call) or ()) > 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected)]
    assert all(gradient.isfinite().all() for gradient in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mask",
    [
        masks.Padding(torch.tensor([-(2**40), -(2**41)])),
        masks.SlidingWindow(150) & masks.Padding(torch.tensor([9, 3])),
    ],
    ids=["no key", "keys before the window"],
)
def test_where_no_key_is_seen_slices_merge_to_nothing(mask: masks.Mask) -> None:
    blocks, call = long_call(torch.float32, 1, mask=mask)
    assert not blocks.run(call).any()


def test_a_mask_that_cannot_be_cut_is_still_right() -> None:
    @dataclasses.dataclass(frozen=True, eq=False)
    class Odd(masks.Mask):
        def visible(self, tile: Any) -> Tensor:
            return tile.key_position % 2 == 1

    blocks, call = long_call(torch.float32, 1, mask=Odd())
    torch.testing.assert_close(
        blocks.run(call).double(), about_one_anchor(blocks, call), rtol=1e-4, atol=1e-5
    )


def test_a_mask_that_cannot_be_cut_is_refused_where_it_would_have_to_be() -> None:
    @dataclasses.dataclass(frozen=True, eq=False)
    class Odd(masks.Mask):
        def visible(self, tile: Any) -> Tensor:
            return tile.key_position % 2 == 1

    blocks, call = long_call(torch.float32, 200, mask=masks.Causal() & Odd())
    with pytest.raises(TypeError, match=r"xPos takes 200 queries .* a Odd cannot be cut"):
        blocks.run(call)


def test_no_token_is_further_from_its_anchor_than_half_a_block() -> None:
    blocks = Blocks.of(XPos(D, 0.5), torch.float32)
    numbers = torch.arange(-1, 4 * blocks.half)
    distance = (numbers.clamp(min=0) - blocks.anchors(numbers)).abs()
    assert distance.max() <= blocks.half
