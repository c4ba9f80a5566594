"""What the short way to the library leaves to the long one, and does not keep.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import zeta
from tests.ops.cpu.plain_calls import Subclass, bits, operands, table_of
from zeta.biases import Alibi, Bucketed, Dense, Softcap
from zeta.masks import Causal, Documents, Padding, PrefixLM, SlidingWindow, keep
from zeta.ops import plain
from zeta.ops.backends.cpu import library, operators
from zeta.ops.call import AttentionCall
from zeta.ops.plain_lowering import Plain
from zeta.ops.precision import Precision

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle()))


class _Steeper(Alibi):
    """One that a user made, and may add more."""


def _negated(*shape: int) -> Tensor:
    """Of numbers whose sign is kept beside them."""
    found = torch.randn(shape, dtype=torch.complex64).conj().imag
    assert found.is_neg()
    return found


class _Later(Causal):
    """One that a user made, and may hide more."""


def _lengths(most: int) -> Tensor:
    return torch.tensor([most, 1])


OPERANDS: dict[str, Callable[..., tuple[object, ...]]] = {
    "a subclass": lambda q, k, v: (q.as_subclass(Subclass), k, v),
    "a parameter": lambda q, k, v: (nn.Parameter(q), k, v),
    "a value that is none": lambda q, k, v: (q, k, None),
    "a query that is none": lambda q, k, v: (None, k, v),
    "three dimensions": lambda q, k, v: (q[0], k[0], v[0]),
    "another batch": lambda q, k, v: (q[:1], k, v),
    "another head dimension": lambda q, k, v: (q[..., :3], k, v),
    "another width of values": lambda q, k, v: (q, k, v[..., :3]),
    "another length of values": lambda q, k, v: (q, k, v[:, :, :3]),
    "heads that do not divide": lambda q, k, v: (q[:, :3], k, v),
    "no key heads": lambda q, k, v: (q, k[:, :0], v[:, :0]),
    "no queries": lambda q, k, v: (q[:, :, :0], k, v),
    "no keys": lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]),
    "no features": lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]),
    "another dtype": lambda q, k, v: (q, k.half(), v),
    "float64": lambda q, k, v: (q.double(), k.double(), v.double()),
    "values of another dtype": lambda q, k, v: (q, k, v.half()),
    "another device": lambda q, k, v: (q, k.to("meta"), v),
    "values elsewhere": lambda q, k, v: (q, k, v.to("meta")),
    "wide heads": lambda q, k, v: tuple(torch.randn(1, 1, 2, 257) for _ in range(3)),
}
REFUSED: dict[str, Callable[..., tuple[object, ...]]] = {
    **OPERANDS,
    "features that are not dense": lambda q, k, v: (q, k.mT.contiguous().mT, v),
    "no mask": lambda q, k, v: (q, k, v, "causal"),
    "a prefix": lambda q, k, v: (q, k, v, PrefixLM(torch.tensor([1, 2]))),
    "documents": lambda q, k, v: (q, k, v, Documents(torch.zeros(2, 37, dtype=torch.int64))),
    "either": lambda q, k, v: (q, k, v, Causal() | keep(bits(2, 1, 1, 37))),
    "a mask of the user's": lambda q, k, v: (q, k, v, _Later()),
    "a huge window": lambda q, k, v: (q, k, v, SlidingWindow(2**31)),
    "a window twice": lambda q, k, v: (q, k, v, SlidingWindow(3) & SlidingWindow(4)),
    "padding twice": lambda q, k, v: (q, k, v, Padding(_lengths(3)) & Padding(_lengths(4))),
    "a tensor twice": lambda q, k, v: (q, k, v, keep(bits(2, 1, 1, 37)) & keep(bits(1, 37))),
    "short lengths": lambda q, k, v: (q, k, v, Padding(_lengths(3).int())),
    "lengths of another batch": lambda q, k, v: (q, k, v, Padding(_lengths(3)[:1])),
    "lengths apart": lambda q, k, v: (q, k, v, Padding(_lengths(3).repeat(2)[::2])),
    "lengths of a subclass": lambda q, k, v: (q, k, v, Padding(_lengths(3).as_subclass(Subclass))),
    "lengths elsewhere": lambda q, k, v: (q, k, v, Padding(_lengths(3).to("meta"))),
    "a tensor of another size": lambda q, k, v: (q, k, v, keep(bits(2, 1, 1, 36))),
    "a tensor elsewhere": lambda q, k, v: (q, k, v, keep(bits(2, 1, 1, 37).to("meta"))),
    "a scale that is no float": lambda q, k, v: (q, k, v, None, None, torch.tensor(0.5)),
    "no bias": lambda q, k, v: (q, k, v, None, "t5"),
    "a bias of the user's": lambda q, k, v: (q, k, v, None, _Steeper(torch.zeros(4))),
    "learned slopes": lambda q, k, v: (q, k, v, None, Alibi(torch.zeros(4, requires_grad=True))),
    "a bias of another size": lambda q, k, v: (q, k, v, None, Dense(torch.zeros(4, 1, 36))),
    "a bias of another dtype": lambda q, k, v: (q, k, v, None, Dense(torch.zeros(1).double())),
    "a bias elsewhere": lambda q, k, v: (q, k, v, None, Dense(torch.zeros(1, device="meta"))),
    "a bias negated on paper": lambda q, k, v: (q, k, v, None, Dense(_negated(1, 37))),
    "a bias twice": lambda q, k, v: (q, k, v, None, Dense(_negated(1)) + Dense(_negated(1))),
    "a table of other heads": lambda q, k, v: (q, k, v, None, Bucketed(torch.zeros(32, 3))),
    "a table without a length": lambda q, k, v: (q, k[0], v, None, Bucketed(torch.zeros(32, 4))),
    "tables": lambda q, k, v: (q, k, v, None, table_of(4) + table_of(4)),
    "a table of halves": lambda q, k, v: (q, k, v, None, Bucketed(torch.zeros(32, 4).half())),
    "a table negated on paper": lambda q, k, v: (q, k, v, None, Bucketed(_negated(32, 4))),
    "slopes of other heads": lambda q, k, v: (q, k, v, None, Alibi(torch.zeros(3))),
    "slopes of another dtype": lambda q, k, v: (q, k, v, None, Alibi(torch.zeros(4).half())),
    "slopes apart": lambda q, k, v: (q, k, v, None, Alibi(torch.zeros(8)[::2])),
    "slopes negated on paper": lambda q, k, v: (q, k, v, None, Alibi(_negated(4))),
    "slopes twice": lambda q, k, v: (q, k, v, None, Alibi(torch.ones(4)) + Alibi(torch.ones(4))),
    "two caps": lambda q, k, v: (q, k, v, None, Softcap(3.0) + Softcap(4.0)),
    "a cap between": lambda q, k, v: (q, k, v, None, table_of(4) + Softcap(3.0) + table_of(4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_leaves_alone_what_is_not_plainly_right(name: str) -> None:
    arguments = REFUSED[name](*operands("a step"))
    assert plain.attend(*(*arguments, None, None, None)[:6]) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPERANDS)
def test_the_short_way_of_compiled_code_leaves_alone_the_same(name: str) -> None:
    arguments = OPERANDS[name](*operands("a step"))
    assert operators.attend(*arguments, None, False) is None  # type: ignore[arg-type]


def test_the_short_way_of_compiled_code_casts_nothing() -> None:
    made = operands("a step")
    found = operators.attend(*made, None, True)
    assert found is not None
    assert torch.equal(found, zeta.attention(*made, mask=Causal(), backend="cpu"))
    with torch.autocast("cpu"):
        assert operators.attend(*made, None, True) is None


def test_it_leaves_alone_what_is_watched() -> None:
    made = operands("a step")
    with torch.autocast("cpu"):
        assert plain.attend(*made, None, None) is None
    with forward_ad.dual_level():
        assert plain.attend(*made, None, None) is None

    def mapped(query: Tensor) -> Tensor:
        assert plain.attend(query, *made[1:], None, None) is None
        return zeta.attention(query, *made[1:], backend="reference")

    found = torch.func.vmap(mapped)(torch.stack((made[0], -made[0])))
    torch.testing.assert_close(found[1], zeta.attention(-made[0], *made[1:]))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_precision_is_passed_on(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    native = library.load()
    assert native.direct is not None

    def kept(*arguments: object) -> int:
        asked.append(bool(arguments[5]))
        return library.DONE

    monkeypatch.setattr(native, "direct", native.direct._replace(attend=kept))
    monkeypatch.setattr(native, "has_tiles", True)  # Else it does not matter.
    made = operands("a step")
    assert plain.attend(*made, None, None, None, precision) is not None
    assert asked == [precision == "high"]
    assert plain.attend(*made, None, None, None, "low") is None  # type: ignore[arg-type]


def options(**scores: Any) -> tuple[object, ...]:
    """What a builtin is given after its tensors."""
    return 0.3, False, 1, *Plain(**scores)


def direct_calls() -> library.DirectCalls:
    direct = library.load().direct
    assert direct is not None
    return direct


def test_the_builtin_refuses_what_it_cannot_read() -> None:
    direct = direct_calls()
    query, key, value = operands("a step")
    out = torch.zeros_like(query)
    assert direct.attend(query, key, value, out, *options()) == library.DONE
    torch.testing.assert_close(out, zeta.attention(query, key, value, scale=0.3))
    _, is_high, threads, *scores = options()
    wrong: list[tuple[object, ...]] = [
        (),
        (query, key, value, out),
        (query, key, value, out, *options(), 1),
        (query, key, value, out, 1, is_high, threads, *scores),
        (query, key, value, out, 0.3, None, threads, *scores),
        (query, key, value, out, 0.3, is_high, 2**70, *scores),
        (query, key, value, None, *options()),
        (query, key, value, out[..., :3], *options()),
        (query, key, value, out.double(), *options()),
        (query, key, value, out.mT.contiguous().mT.expand(2, 4, 1, 64)[..., ::2], *options()),
    ]
    for arguments in wrong:
        assert direct.attend(*arguments) == library.NOT_PLAIN, arguments
        assert direct.attend_with_lse(*arguments) == library.NOT_PLAIN, arguments


TABLE, BUCKETS = torch.randn(3, 4), torch.tensor([0, 1, 2, 1, 0])
WRONG_SCORES: list[dict[str, object]] = [
    {"window": -1},
    {"window": 2**31},
    {"softcap": -1.0},
    {"softcap": 1},
    {"dropout_p": 1.0},
    {"dropout_p": -0.5},
    {"dropout_p": 0},
    {"drop_below": 2**31},
    {"seed": 2**63},
    {"seed": None},
    *(
        {name: tensor}
        for name in ("padding_B", "keep", "offsets", "slopes_H", "dense")
        for tensor in (3, torch.zeros(()), torch.zeros(1, 1, 1, 3), torch.zeros(4, 4))
    ),
    {"table": TABLE},
    {"table": TABLE, "buckets_R": 3},
    {"table": TABLE, "buckets_R": BUCKETS.int()},
    {"table": TABLE, "buckets_R": BUCKETS[:4]},
    {"table": TABLE, "buckets_R": BUCKETS[:, None]},
    {"table": TABLE, "buckets_R": torch.arange(10)[::2]},
    {"table": TABLE, "buckets_R": BUCKETS + 1},
    {"table": TABLE, "buckets_R": BUCKETS - 1},
    {"table": TABLE.half(), "buckets_R": BUCKETS},
    {"table": TABLE[:, :3], "buckets_R": BUCKETS},
    {"table": TABLE[0], "buckets_R": BUCKETS},
    {"table": TABLE, "buckets_R": BUCKETS, "offsets": torch.zeros(4, 5)},
]


@pytest.mark.parametrize("scores", WRONG_SCORES, ids=" ".join)
def test_the_builtin_refuses_masks_and_biases_that_it_cannot_read(scores: dict[str, Any]) -> None:
    query, key, value = operands("a step")
    arguments = (query, key, value, torch.zeros_like(query), *options(**scores))
    assert direct_calls().attend(*arguments) == library.NOT_PLAIN
    assert direct_calls().attend_with_lse(*arguments) == library.NOT_PLAIN


def test_the_builtin_refuses_gradients_that_it_cannot_write() -> None:
    differentiate = direct_calls().differentiate
    query, key, value = operands("a step")
    out = torch.zeros_like(query)
    lse = direct_calls().attend_with_lse(query, key, value, out, *options())
    made = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    given, of_bias = (query, key, value, out, lse, out), (None, None)
    assert differentiate(*given, *made, *of_bias, *options()) == library.DONE
    wrong: list[tuple[object, ...]] = [
        (*given, *made, *of_bias),
        (*given, *made, *options()),
        (*given, *made[::-1], *of_bias, *options()),
        (*given[:5], key, *made, *of_bias, *options()),
        # No bias is given that could have a gradient.
        (*given, *made, torch.zeros(4, 3), None, *options()),
        (*given, *made, None, torch.zeros(1, 1, 1, 1), *options()),
        *(
            (*given[:4], wrong_lse, out, *made, *of_bias, *options())
            for wrong_lse in (None, lse[..., :0], lse.double(), lse.bfloat16())
        ),
    ]
    offsets, dense = torch.zeros(4, 3), torch.zeros(1, 4, 1, 37)
    biased = options(offsets=offsets, dense=dense)
    assert differentiate(*given, *made, offsets + 0, dense + 0, *biased) == library.DONE
    wrong += [
        (*given, *made, *gradients, *biased)
        for gradients in (
            (torch.zeros(4, 5), None), (torch.zeros(3, 4).T, None), (offsets.half(), None),
            (3, None), (None, torch.zeros(1, 4, 1, 1)), (None, dense.half()), (None, dense[0]),
            (None, "dense"), (None, torch.zeros(1, 37, 1, 4).transpose(1, 3)),
        )
    ]  # fmt: skip
    for arguments in wrong:
        assert differentiate(*arguments) == library.NOT_PLAIN


def test_it_does_not_keep_what_it_was_given() -> None:
    made = operands("blocks")
    before = [sys.getrefcount(tensor) for tensor in made]
    for _ in range(10):
        assert plain.attend(*made, None, None) is not None
        assert plain.attend(made[0], made[1], made[2][..., :3], None, None) is None
    assert [sys.getrefcount(tensor) for tensor in made] == before


def test_a_call_with_anything_more_is_left_alone() -> None:
    made = operands("a step")
    call = AttentionCall.checked(*made, dropout_p=0.5)
    assert plain.attend_call(call) is not None
    more = {
        "sinks": torch.zeros(4),
        "query_positions": torch.arange(1),
        "key_positions": torch.arange(37),
    }
    for name, value in more.items():
        changed = AttentionCall.checked(*made, **{name: value})  # type: ignore[arg-type]
        assert plain.attend_call(changed) is None, name
