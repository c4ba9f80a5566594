"""The short way to the library: the same bits as the long one, or nothing at all.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import zeta
from zeta.biases import Alibi, Bias, Bucketed, Dense, Softcap
from zeta.masks import Causal, Documents, Mask, Padding, PrefixLM, SlidingWindow, keep
from zeta.ops import plain
from zeta.ops.backends.cpu import library
from zeta.ops.call import AttentionCall
from zeta.ops.precision import Precision

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle()))

Operands = tuple[Tensor, Tensor, Tensor]
SHAPES = {  # B, H, G, T, S, D
    "one number": (1, 1, 1, 1, 1, 1),
    "a step": (2, 4, 2, 1, 37, 64),
    "a chunk of grouped heads": (1, 8, 2, 3, 50, 40),
    "blocks": (2, 2, 1, 130, 300, 72),
    "more queries than keys": (1, 2, 2, 70, 33, 16),
}


MASKS: dict[str, Callable[..., Mask | None]] = {  # of B, H, T, S
    "none": lambda *_: None,
    "causal": lambda *_: Causal(),
    "window": lambda *_: SlidingWindow(3),
    "a window of everything": lambda *_: SlidingWindow(2**31 - 1),
    "padding": lambda batch, _, __, source: Padding(torch.arange(batch) * 30 + source % 30),
    "padding of everything": lambda batch, *_: Padding(torch.full((batch,), -5)),
    "padding of any length": lambda batch, *_: Padding(torch.full((batch,), 2**40)),
    "keys": lambda batch, _, __, source: keep(_bits(batch, 1, 1, source)),
    "all pairs": lambda *shape: keep(_bits(*shape)),
    "pairs across": lambda batch, heads, target, source: keep(
        _bits(batch, heads, source, target).mT
    ),
    "pairs of every sequence": lambda _, __, target, source: keep(_bits(target, source)),
    "all of them": lambda batch, _, target, source: (
        Causal() & Padding(torch.full((batch,), source - 1)) & keep(_bits(1, 1, target, 1))
        & SlidingWindow(40)
    ),
}  # fmt: skip


BIASES: dict[str, Callable[..., Bias]] = {  # of B, H, T, S, the dtype
    "dense": lambda batch, heads, target, source, _: Dense(_dense(batch, heads, target, source)),
    "dense across": lambda _, heads, target, source, dtype: Dense(
        _dense(heads, source, target).mT.to(dtype)
    ),
    "dense of keys": lambda batch, _, __, source, dtype: Dense(
        _dense(batch, 1, 1, source).masked_fill(_bits(batch, 1, 1, source), -torch.inf).half()
    ),
    "table": lambda _, heads, *__: _table(heads),
    "table in half": lambda _, heads, *__: Bucketed(_table(heads).table.bfloat16()),
    "slopes": lambda _, heads, *__: Alibi(torch.rand(heads)),
    "cap": lambda *_: Softcap(2),
    "cap, then table": lambda _, heads, *__: Softcap(0.5) + _table(heads),
    "all of them": lambda batch, heads, target, source, dtype: (
        _table(heads) + Alibi(torch.rand(heads)) + Dense(_dense(batch, 1, target, 1).to(dtype))
        + Softcap(0.5)
    ),
}  # fmt: skip


def _dense(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def bias_of(kind: str, made: Operands) -> Bias:
    query, key, _ = made
    return BIASES[kind](*query.shape[:3], key.shape[2], query.dtype)


def _bits(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.6


def mask_of(kind: str, made: Operands) -> Mask | None:
    return MASKS[kind](*made[0].shape[:3], made[1].shape[2])


KINDS = [
    *((kind, "none") for kind in MASKS),
    *(("none", kind) for kind in BIASES),
    ("all of them", "all of them"),
]


def scores_of(kinds: tuple[str, str], made: Operands) -> tuple[Mask | None, Bias | None]:
    mask, bias = kinds
    return mask_of(mask, made), None if bias == "none" else bias_of(bias, made)


def operands(name: str, dtype: torch.dtype = torch.float32, inside: bool = False) -> Operands:
    """Query, key and value; ``inside``: their heads lie inside the length, as projected ones."""
    batch, heads, key_heads, target, source, dim = SHAPES[name]

    def made(number: int, length: int) -> Tensor:
        if inside:
            # Of a wider tensor, so that nothing is contiguous.
            wide = torch.randn(batch, length, number + 1, dim, dtype=dtype)
            return wide[:, :, :number].transpose(1, 2)
        return torch.randn(batch, number, length, dim, dtype=dtype)

    return made(heads, target), made(key_heads, source), made(key_heads, source)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_it_gives_the_same_bits(
    name: str, dtype: torch.dtype, kinds: tuple[str, str], inside: bool
) -> None:
    made = operands(name, dtype, inside)
    mask, bias = scores_of(kinds, made)
    found = plain.attend(*made, mask, bias, 0.3)
    assert found is not None
    expected = zeta.attention(*made, mask=mask, bias=bias, scale=0.3, backend="cpu")
    assert torch.equal(found, expected)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert found.transpose(1, 2).is_contiguous() or found.is_contiguous()


def test_the_scale_is_that_of_the_head_dimension() -> None:
    made = operands("blocks")
    found = plain.attend(*made, None, None)
    assert found is not None
    assert torch.equal(found, zeta.attention(*made, backend="cpu"))


def gradients(out: Tensor, made: Operands, grad_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, made, grad_out)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_its_gradients_are_the_same_bits(
    name: str, dtype: torch.dtype, kinds: tuple[str, str], inside: bool
) -> None:
    made = operands(name, dtype, inside)
    mask, bias = scores_of(kinds, made)
    for tensor in made:
        tensor.requires_grad_()
    found = plain.attend(*made, mask, bias, 0.3)
    assert found is not None
    expected = zeta.attention(*made, mask=mask, bias=bias, scale=0.3, backend="cpu")
    assert torch.equal(found, expected)
    grad_out = torch.randn_like(found)
    actual = gradients(found, made, grad_out)
    for one, other in zip(actual, gradients(expected, made, grad_out), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "kind",
    ["dense", "dense across", "dense of keys", "table", "table in half", "cap, then table"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_learned_biases_get_the_same_bits(name: str, dtype: torch.dtype, kind: str) -> None:
    made = operands(name, dtype)
    bias = bias_of(kind, made)
    (learned,) = bias.flatten()[1]
    assert learned.is_floating_point()
    learned.requires_grad_()
    found = plain.attend(*made, Causal(), bias)  # Nothing else is learned.
    assert found is not None
    expected = zeta.attention(*made, mask=Causal(), bias=bias, backend="cpu")
    grad_out = torch.randn_like(found)
    (actual,) = torch.autograd.grad(found, learned, grad_out)
    (gradient,) = torch.autograd.grad(expected, learned, grad_out)
    assert actual.dtype == learned.dtype
    assert torch.equal(actual, gradient)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kinds", [("none", "none"), ("all of them", "all of them")], ids=str)
@pytest.mark.parametrize("seed", [-5, 2**63 - 1, torch.tensor(1234567890123), None], ids=str)
@pytest.mark.parametrize("name", ["a step", "blocks"])
def test_it_drops_the_same_weights(
    name: str, seed: int | Tensor | None, kinds: tuple[str, str]
) -> None:
    made = operands(name)
    for tensor in made:
        tensor.requires_grad_()
    mask, bias = scores_of(kinds, made)
    found = []
    for backend in ("auto", "cpu"):
        torch.manual_seed(3)
        out = zeta.attention(*made, mask=mask, bias=bias, dropout_p=0.3, seed=seed, backend=backend)
        found.append((out, *gradients(out, made, torch.ones(1).expand(out.shape))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(found[0][0], zeta.attention(*made, mask=mask, bias=bias))
    if seed is not None:
        assert plain.attend(*made, mask, bias, dropout_p=0.3, seed=seed) is not None


def learned(name: str = "a chunk of grouped heads") -> Operands:
    query, key, value = operands(name)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def test_a_gradient_for_one_operand_only() -> None:
    query, key, value = operands("blocks")
    key.requires_grad_()
    for attend in (zeta.attention, lambda *made: zeta.attention(*made, backend="cpu")):
        attend(query, key, value).sum().backward()  # A gradient that is one number everywhere.
    assert key.grad is not None
    (once,) = torch.autograd.grad(zeta.attention(query, key, value).sum(), key)
    torch.testing.assert_close(key.grad, 2 * once)
    assert query.grad is None


def test_a_second_derivative_is_an_error() -> None:
    made = learned()
    out = plain.attend(*made, None, None)
    assert out is not None
    (first,) = torch.autograd.grad(out.sum(), made[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        first.sum().backward()


def test_a_tensor_written_to_before_the_backward_pass_is_noticed() -> None:
    query, key, value = learned()
    written = key * 1
    out = plain.attend(query, written, value, None, None)
    assert out is not None
    written.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("which", ["lengths", "tensor"])
def test_a_mask_written_to_before_the_backward_pass_is_noticed(which: str) -> None:
    made = learned("blocks")
    mask = Padding(torch.tensor([100, 200])) if which == "lengths" else keep(_bits(2, 1, 1, 300))
    out = plain.attend(*made, mask, None)
    assert out is not None
    getattr(mask, which).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("kinds", [("none", "none"), ("all of them", "all of them")], ids=str)
def test_saved_tensors_may_come_back_otherwise(kinds: tuple[str, str]) -> None:
    """Of other strides, or of a class of their own."""
    made = learned("blocks")
    mask, bias = scores_of(kinds, made)
    out = zeta.attention(*made, mask=mask, bias=bias)
    expected = gradients(out, made, torch.ones(1).expand(made[0].shape))

    def spread(saved: Tensor) -> Tensor:
        return saved.mT.contiguous().mT if saved.dim() > 1 else saved

    def wrapped(saved: Tensor) -> Tensor:
        return saved.as_subclass(_Subclass)

    for change in (spread, wrapped):
        with torch.autograd.graph.saved_tensors_hooks(change, lambda saved: saved):
            out = plain.attend(*made, mask, bias)
        assert out is not None
        actual = gradients(out, made, torch.ones(1).expand(made[0].shape))
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_without_gradients_nothing_is_recorded() -> None:
    made = learned()
    with torch.no_grad():
        out = plain.attend(*made, None, None)
    assert out is not None
    assert not out.requires_grad
    recorded = plain.attend(*made, None, None)
    assert recorded is not None
    assert recorded.requires_grad
    assert torch.equal(out, recorded)


class _Subclass(Tensor):
    pass


class _Steeper(Alibi):
    """One that a user made, and may add more."""


def _table(heads: int) -> Bucketed:
    return Bucketed(torch.randn(16, heads, generator=torch.Generator().manual_seed(heads)))


def _negated(*shape: int) -> Tensor:
    """Of numbers whose sign is kept beside them."""
    found = torch.randn(shape, dtype=torch.complex64).conj().imag
    assert found.is_neg()
    return found


class _Later(Causal):
    """One that a user made, and may hide more."""


def _lengths(most: int) -> Tensor:
    return torch.tensor([most, 1])


REFUSED: dict[str, Callable[..., tuple[object, ...]]] = {
    "a subclass": lambda q, k, v: (q.as_subclass(_Subclass), k, v),
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
    "another device": lambda q, k, v: (q, k.to("meta"), v),
    "features that are not dense": lambda q, k, v: (q, k.mT.contiguous().mT, v),
    "wide heads": lambda q, k, v: tuple(torch.randn(1, 1, 2, 257) for _ in range(3)),
    "no mask": lambda q, k, v: (q, k, v, "causal"),
    "a prefix": lambda q, k, v: (q, k, v, PrefixLM(torch.tensor([1, 2]))),
    "documents": lambda q, k, v: (q, k, v, Documents(torch.zeros(2, 37, dtype=torch.int64))),
    "either": lambda q, k, v: (q, k, v, Causal() | keep(_bits(2, 1, 1, 37))),
    "a mask of the user's": lambda q, k, v: (q, k, v, _Later()),
    "a huge window": lambda q, k, v: (q, k, v, SlidingWindow(2**31)),
    "a window that is no int": lambda q, k, v: (q, k, v, SlidingWindow(2.5)),  # type: ignore[arg-type]
    "a window twice": lambda q, k, v: (q, k, v, SlidingWindow(3) & SlidingWindow(4)),
    "padding twice": lambda q, k, v: (q, k, v, Padding(_lengths(3)) & Padding(_lengths(4))),
    "a tensor twice": lambda q, k, v: (q, k, v, keep(_bits(2, 1, 1, 37)) & keep(_bits(1, 37))),
    "short lengths": lambda q, k, v: (q, k, v, Padding(_lengths(3).int())),
    "lengths of another batch": lambda q, k, v: (q, k, v, Padding(_lengths(3)[:1])),
    "lengths apart": lambda q, k, v: (q, k, v, Padding(_lengths(3).repeat(2)[::2])),
    "lengths of a subclass": lambda q, k, v: (q, k, v, Padding(_lengths(3).as_subclass(_Subclass))),
    "lengths elsewhere": lambda q, k, v: (q, k, v, Padding(_lengths(3).to("meta"))),
    "a tensor of another size": lambda q, k, v: (q, k, v, keep(_bits(2, 1, 1, 36))),
    "a tensor elsewhere": lambda q, k, v: (q, k, v, keep(_bits(2, 1, 1, 37).to("meta"))),
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
    "tables": lambda q, k, v: (q, k, v, None, _table(4) + _table(4)),
    "slopes of other heads": lambda q, k, v: (q, k, v, None, Alibi(torch.zeros(3))),
    "slopes of another dtype": lambda q, k, v: (q, k, v, None, Alibi(torch.zeros(4).half())),
    "slopes apart": lambda q, k, v: (q, k, v, None, Alibi(torch.zeros(8)[::2])),
    "slopes negated on paper": lambda q, k, v: (q, k, v, None, Alibi(_negated(4))),
    "slopes twice": lambda q, k, v: (q, k, v, None, Alibi(torch.ones(4)) + Alibi(torch.ones(4))),
    "two caps": lambda q, k, v: (q, k, v, None, Softcap(3.0) + Softcap(4.0)),
    "a cap between": lambda q, k, v: (q, k, v, None, _table(4) + Softcap(3.0) + _table(4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_leaves_alone_what_is_not_plainly_right(name: str) -> None:
    arguments = REFUSED[name](*operands("a step"))
    assert plain.attend(*(*arguments, None, None, None)[:6]) is None  # type: ignore[arg-type]


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


def test_the_builtin_refuses_what_it_cannot_read() -> None:
    direct = library.load().direct
    assert direct is not None
    query, key, value = operands("a step")
    out = torch.zeros_like(query)
    numbers, nothing = (0, 0, 0.0, 0, 0.0, 0, 0), (None, None, None, None, None)
    scores = (*numbers, *nothing)
    options = (0.3, 0, 0, 1, *scores)
    lse = direct.attend_with_lse(query, key, value, out, *options)
    gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    backwards = (query, key, value, out, lse, out)
    of_bias = (None, None)
    assert direct.differentiate(*backwards, *gradients, *of_bias, *options) == library.DONE
    for spoilt in (
        (*backwards, *gradients, *of_bias),
        (*backwards, *gradients, *options),
        (*backwards, *gradients[::-1], *of_bias, *options),
        (*backwards[:5], key, *gradients, *of_bias, *options),
        # No bias is given that could have a gradient.
        (*backwards, *gradients, torch.zeros(4, 3), None, *options),
        (*backwards, *gradients, None, torch.zeros(1, 1, 1, 1), *options),
    ):
        assert direct.differentiate(*spoilt) == library.NOT_PLAIN
    offsets, dense = torch.zeros(4, 3), torch.zeros(1, 4, 1, 37)
    biased = (*options[:-3], offsets, None, dense)
    assert (
        direct.differentiate(*backwards, *gradients, offsets + 0, dense + 0, *biased)
        == library.DONE
    )
    for wrong_offsets, wrong_dense in (
        (torch.zeros(4, 5), None), (torch.zeros(3, 4).T, None), (offsets.half(), None), (3, None),
        (None, torch.zeros(1, 4, 1, 1)), (None, dense.half()), (None, dense[0]), (None, "dense"),
        (None, torch.zeros(1, 37, 1, 4).transpose(1, 3)),
    ):  # fmt: skip
        spoilt = (*backwards, *gradients, wrong_offsets, wrong_dense, *biased)
        assert direct.differentiate(*spoilt) == library.NOT_PLAIN
    for wrong_lse in (None, lse[..., :0], lse.double(), lse.bfloat16()):
        spoilt = (query, key, value, out, wrong_lse, out, *gradients, *of_bias, *options)
        assert direct.differentiate(*spoilt) == library.NOT_PLAIN
    assert direct.attend(query, key, value, out, *options) == library.DONE
    torch.testing.assert_close(out, zeta.attention(query, key, value, scale=0.3))
    wrong: list[tuple[object, ...]] = [
        (),
        (query, key, value, out),
        (query, key, value, out, *options, 1),
        (query, key, value, out, 1, 0, 0, 1, *scores),
        (query, key, value, out, 0.3, None, 0, 1, *scores),
        (query, key, value, out, 0.3, 0, 2**70, 1, *scores),
        *(
            (
                query,
                key,
                value,
                out,
                0.3,
                0,
                0,
                1,
                *numbers[:place],
                number,
                *numbers[place + 1 :],
                *nothing,
            )
            for place, number in (
                (1, -1),
                (1, 2**31),
                (2, -1.0),
                (2, 1),
                (4, 1.0),
                (4, -0.5),
                (4, 0),
                (5, 2**31),
                (6, 2**63),
                (6, None),
            )
        ),
        *(
            (
                query,
                key,
                value,
                out,
                0.3,
                0,
                0,
                1,
                *numbers,
                *nothing[:place],
                wrong_tensor,
                *nothing[place + 1 :],
            )
            for place in range(len(nothing))
            for wrong_tensor in (3, torch.zeros(()), torch.zeros(1, 1, 1, 3), torch.zeros(4, 4))
        ),
        (query, key, value, None, *options),
        (query, key, value, out[..., :3], *options),
        (query, key, value, out.double(), *options),
        (query, key, value, out.mT.contiguous().mT.expand(2, 4, 1, 64)[..., ::2], *options),
    ]
    for arguments in wrong:
        assert direct.attend(*arguments) == library.NOT_PLAIN, arguments
        assert direct.attend_with_lse(*arguments) == library.NOT_PLAIN, arguments
    with pytest.raises(RuntimeError, match="neither the processor nor the build"):
        library.check(direct.attend(query, key, value, out, 0.3, 0, 9, 1, *scores))
    with pytest.raises(RuntimeError, match="neither the processor nor the build"):
        library.check(direct.attend_with_lse(query, key, value, out, 0.3, 0, 9, 1, *scores))


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
