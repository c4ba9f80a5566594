"""Rotations by the native pass, against the textbook in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.ops.cpu import units
from tests.ops.rotations import MODULES, TURNINGS, Turning, run_of_module, wrongly_turned
from zeta.caches import StaticCache
from zeta.nn import MultiheadAttention, RotaryEmbedding
from zeta.ops import rotation as choice
from zeta.ops.backends.cpu import library, rotation
from zeta.ops.rotation import Table, rotate_both
from zeta.ops.turning import Kernel
from zeta.positions import rotary_tables, rotate, rotate_part

pytestmark = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no native kernels: {library.obstacle()}"
)
MORE = [
    Turning("wide", head_dim=256, length=20, heads=3, key_heads=1),
    Turning("several blocks", length=150, heads=3, key_heads=3, positions="own"),
    Turning("one pair", head_dim=2, interleaved=False, length=7),
    Turning("one pair of many", head_dim=33, rotary_dim=2, length=7, layout="BHLD"),
]


@pytest.mark.usefixtures("unit")
@units.on_each([pair for pair in units.ALL if pair[0] in ("AVX2", "AVX-512")])
@pytest.mark.parametrize("turning", TURNINGS + MORE, ids=lambda turning: turning.name)
def test_results_and_gradients(turning: Turning, dtype: torch.dtype) -> None:
    turning.check(rotation.rotated, dtype)


def test_wrong_numbers_are_found() -> None:
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        TURNINGS[0].check(wrongly_turned(rotation.rotated), torch.float32)


def _leaves() -> tuple[Tensor, Tensor, Table]:
    query = torch.randn(2, 4, 5, 8, requires_grad=True)
    key = torch.randn(2, 2, 5, 8, requires_grad=True)
    return query, key, rotary_tables(torch.arange(5), 8)


def _refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on torch turns."""
    monkeypatch.setattr(choice, "kernel_for", lambda tensors, tables: None)


@pytest.mark.parametrize("name", ["query", "key", "neither"])
def test_gradients_that_nobody_asks_for(name: str) -> None:
    query, key, table = _leaves()
    leaves = {"query": query, "key": key}
    for other in leaves.keys() - {name}:
        leaves[other].requires_grad_(False)
    turned = dict(zip(leaves, rotate_both(query, key, table, table), strict=True))
    assert {side: x.requires_grad for side, x in turned.items()} == {
        side: side == name for side in leaves
    }
    if name != "neither":
        (found,) = torch.autograd.grad(turned[name].square().sum(), leaves[name])
        # A rotation keeps lengths.
        torch.testing.assert_close(found, 2 * leaves[name].detach())


def test_it_can_be_differentiated_twice() -> None:
    query, key, table = _leaves()

    def penalty(turned: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad((turned**3).sum(), query, create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), query)[0]

    found = penalty(rotate_both(query, key, table, table)[0])
    torch.testing.assert_close(found, penalty(rotate(query, *table)))


def test_many_gradients_at_once() -> None:
    query, key, table = _leaves()
    turned = rotate_both(query, key, table, table)
    many = [torch.randn(3, *x.shape) for x in turned]
    found = torch.autograd.grad(turned, (query, key), many, is_grads_batched=True)
    for leaf, batch, incoming in zip((query, key), found, many, strict=True):
        for got, one in zip(batch, incoming, strict=True):
            (expected,) = torch.autograd.grad(rotate(leaf, *table), leaf, one)
            torch.testing.assert_close(got, expected)


# Forward mode uses it itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_of_a_gradient_after_the_rotation() -> None:
    query, key, table = _leaves()
    turned, _ = rotate_both(query, key, table, table)
    expected = rotate(query, *table)

    def gradient(of: Tensor, incoming: Tensor) -> Tensor:
        return torch.autograd.grad(of, query, incoming, retain_graph=True)[0]

    many = torch.randn(3, *query.shape)
    mapped = torch.vmap(lambda incoming: gradient(turned, incoming))(many)
    torch.testing.assert_close(
        mapped, torch.stack([gradient(expected, incoming) for incoming in many])
    )
    with forward_ad.dual_level():
        dual = gradient(turned, forward_ad.make_dual(many[0], many[1]))
        torch.testing.assert_close(
            forward_ad.unpack_dual(dual).tangent, gradient(expected, many[1])
        )


def test_a_frozen_key_leaves_no_gradient_in_a_cache() -> None:
    module = MultiheadAttention(
        None, 32, 4, self_attention=True, position=RotaryEmbedding(8)
    ).requires_grad_(False)
    module.q_proj.weight.requires_grad_(True)
    x = torch.randn(1, 1, 32)
    out, _ = module(x, x, x, StaticCache(4), is_causal=True)
    assert out.requires_grad
    state: dict[str, Tensor] = {}
    module(x, x, x, state)
    assert not state["prev_key"].requires_grad


def test_a_gradient_that_is_broadcast() -> None:
    query, _, table = _leaves()
    (found,) = torch.autograd.grad(choice.rotate_one(query, table).sum(), query)
    (expected,) = torch.autograd.grad(rotate(query, *table).sum(), query)
    torch.testing.assert_close(found, expected)


def test_results_are_laid_out_as_what_was_turned() -> None:
    query, key, table = _leaves()
    inside = query.detach().transpose(1, 2).contiguous().transpose(1, 2)
    turned, turned_key = rotate_both(inside, key, table, table)
    assert turned.stride() == inside.stride()
    assert turned_key.stride() == key.stride()


@pytest.mark.parametrize("interleaved", [True, False])
def test_results_do_not_depend_on_threads(interleaved: bool) -> None:
    query, key = torch.randn(2, 2, 6, 300, 64).unbind()
    table = rotary_tables(torch.arange(300), 64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            turned = rotate_both(query, key, table, table, interleaved=interleaved)
            found.append(torch.stack(turned))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_infinities_and_nans_go_where_they_belong() -> None:
    x = torch.zeros(1, 1, 1, 12)
    x[..., 2], x[..., 5] = float("inf"), float("nan")
    for interleaved in (True, False):
        cos, sin = torch.full((2, 1, 6), 0.5).unbind()
        found = rotation.rotated(x, None, (cos, sin), interleaved)[0]
        expected = rotate(x, cos, sin, interleaved=interleaved)
        torch.testing.assert_close(found, expected, equal_nan=True)


class _Subclass(Tensor):
    pass


Spoil = Callable[[Tensor, Table], tuple[Tensor, Table]]

LEFT_TO_TORCH: dict[str, Spoil] = {
    "float64": lambda x, table: (x.double(), (table[0].double(), table[1].double())),
    "tables of float64": lambda x, table: (x, (table[0].double(), table[1].double())),
    "three dimensions": lambda x, table: (x[0], table),
    "a subclass": lambda x, table: (x.as_subclass(_Subclass), table),
    "learned tables": lambda x, table: (x, (table[0].clone().requires_grad_(), table[1])),
}


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_what_is_left_to_torch(name: str) -> None:
    x, table = torch.randn(2, 4, 5, 8), rotary_tables(torch.arange(5), 8)
    assert choice.kernel_for((x,), table) is not None
    x, table = LEFT_TO_TORCH[name](x, table)
    assert choice.kernel_for((x,), table) is None
    assert torch.equal(choice.rotate_one(x, table), rotate(x, *table))


# torch.func.jvp uses it itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_and_other_devices_are_left_to_torch() -> None:
    x, table = torch.randn(3, 2, 4, 5, 8), rotary_tables(torch.arange(5), 8)
    mapped = torch.func.vmap(lambda x: choice.rotate_one(x, table))(x)
    torch.testing.assert_close(mapped, rotate(x, *table))
    tangent = torch.randn_like(x[0])
    _, turned = torch.func.jvp(lambda x: choice.rotate_one(x, table), (x[0],), (tangent,))
    torch.testing.assert_close(turned, rotate(tangent, *table))
    nowhere = x[0].to("meta"), (table[0].to("meta"), table[1].to("meta"))
    assert choice.rotate_one(*nowhere).device.type == "meta"


UNUSUAL: dict[str, Spoil] = {
    "a row of features apart": lambda x, table: (x.repeat_interleave(2, -1)[..., ::2], table),
    "the last dimension outside": lambda x, table: (x.mT.contiguous().mT, table),
    "expanded": lambda x, table: (x[:1].expand(2, -1, -1, -1), table),
    "negated": lambda x, table: (torch._neg_view(x), table),
    "zeros that are nowhere": lambda x, table: (torch._efficientzerotensor(x.shape), table),
    "empty": lambda x, table: (x[:, :, :0], (table[0][:0], table[1][:0])),
    "one position for all": lambda x, table: (x, (table[0][2:3], table[1][2:3])),
    "tables apart": lambda x, table: (x, (torch.cat(table, 1)[:, :4], torch.cat(table, 1)[:, 4:])),
    "tables transposed": lambda x, table: (x, (table[0].T.contiguous().T, table[1])),
    "more features than attention takes": lambda x, table: (x.repeat(1, 1, 1, 40), table),
}


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_tensors(name: str, interleaved: bool) -> None:
    x, table = UNUSUAL[name](torch.randn(2, 4, 5, 8), rotary_tables(torch.arange(5), 8))
    found = choice.rotate_one(x, table, interleaved=interleaved)
    expected = rotate_part(x, *table, interleaved=interleaved)
    torch.testing.assert_close(found, expected)


def test_two_dtypes_are_turned_each_as_it_is() -> None:
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8).bfloat16()
    table = rotary_tables(torch.arange(5), 8)
    turned = rotate_both(query, key, table, table)
    assert [x.dtype for x in turned] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(turned[1], rotate(key, *table), atol=0.02, rtol=0.02)


def test_the_builtin_refuses_what_it_cannot_read() -> None:
    direct = library.load().direct
    assert direct is not None
    x, (cos, sin) = torch.randn(2, 4, 5, 8), rotary_tables(torch.arange(5), 8)
    out = torch.zeros_like(x)
    options = (True, False, 1)
    assert direct.rotate(*options, x, out, cos, sin) == library.DONE
    torch.testing.assert_close(out, rotate(x, cos, sin))
    one = x, out, cos, sin
    wrong: list[tuple[object, ...]] = [
        (),
        (*options, x, out, cos),
        (*options, *one, x),
        (*options, *one, *one, *one),
        (None, False, 1, *one),
        (*options, None, out, cos, sin),
        (*options, x, out, cos, 0),
        (*options, x[0], out[0], cos, sin),
        (*options, x, out[:, :3], cos, sin),
        (*options, x, out.double(), cos, sin),
        (*options, x.double(), out.double(), cos, sin),
        (*options, x, out, cos.double(), sin),
        (*options, x, out, cos[:4], sin[:4]),
        (*options, x, out, cos[:, :3], sin),
        (*options, x, out, cos[None], sin[None]),
        (*options, x, out, cos.expand(2, 4, 5, 4), sin),
        (*options, x, out, cos.expand(3, 1, 5, 4), sin),
        (*options, x, out, torch.ones(()), torch.ones(())),
        (*options, x, out, torch.ones(5, 5), torch.ones(5, 5)),
        (*options, x, out, torch.ones(5, 0), torch.ones(5, 0)),
        (*options, *one, x.bfloat16(), out.bfloat16(), cos, sin),
        (*options, *one, x[..., :6].clone(), out[..., :6].clone(), cos[:, :3], sin[:, :3]),
    ]
    for arguments in wrong:
        assert direct.rotate(*arguments) == library.NOT_PLAIN, arguments


@pytest.mark.parametrize("kind", MODULES)
def test_modules_take_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it and without, a module computes the same, and it is used."""
    run, calls = run_of_module(kind), []

    def counted(kernel: Kernel) -> Kernel:
        def call(query: Tensor, key: Tensor | None, tables: Sequence[Tensor], how: bool) -> object:
            calls.append(how)
            return kernel(query, key, tables, how)

        return call  # type: ignore[return-value]  # as it came

    for options in ({}, {"positions": torch.tensor([[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]])}):
        with monkeypatch.context() as patch:
            patch.setattr(rotation, "rotated", counted(rotation.rotated))
            actual = run(**options)
        with monkeypatch.context() as patch:
            _refuses(patch)
            expected = run(**options)
        for found, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(found, wanted)
    assert calls == [kind != "halves"] * 2


def test_a_program_without_the_library_is_turned_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "obstacle", lambda: "it is not there")
    query, key, table = _leaves()
    assert choice.kernel_for((query, key), (*table, *table)) is None
    assert torch.equal(rotate_both(query, key, table, table)[1], rotate(key, *table))
