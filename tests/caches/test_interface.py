"""What every cache refuses, and that it is then what it was; modes, devices, state dicts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.caches.histories import HEAD_DIM, VALUE_DIM, same
from tests.caches.kinds import KINDS, new_pool
from zeta.caches import (
    Cache,
    CacheFullError,
    CrossCache,
    DecodingCache,
    DictCache,
    DynamicCache,
    PagedCache,
    QuantizedCache,
    RollingCache,
    StaticCache,
)

NAMES = [name for name in KINDS if name != "dict"]


def tokens(
    count: int, *, batch: int = 2, heads: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    key = torch.randn(batch, heads, count, HEAD_DIM, dtype=dtype)
    return key, torch.randn(batch, heads, count, VALUE_DIM, dtype=dtype)


def filled(name: str) -> DecodingCache:
    cache = KINDS[name].make(2)
    padding = torch.tensor([[True, False, False], [False, True, False]])
    cache.update(*tokens(3), padding)
    return cache


REFUSALS: dict[str, tuple[Callable[[DecodingCache], object], str]] = {
    "other heads": (lambda c: c.update(*tokens(1, heads=3)), r"key must be \(2, 2, length, 6\)"),
    "other batch": (lambda c: c.update(*tokens(1, batch=3)), r"key must be \(2, 2, length, 6\)"),
    "other dtype": (
        lambda c: c.update(*tokens(1, dtype=torch.float32)),
        "must be torch.float64 on cpu, as in the cache; got torch.float32",
    ),
    "other head_dim": (
        lambda c: c.update(tokens(1)[0][..., :4], tokens(1)[1]),
        r"key must be \(2, 2, length, 6\).*got \(2, 2, length, 4\)",
    ),
    "other value_dim": (
        lambda c: c.update(tokens(1)[0], tokens(1)[1][..., :4]),
        r"value must be \(2, 2, length, 5\).*got \(2, 2, length, 4\)",
    ),
    "three dimensions": (
        lambda c: c.update(tokens(1)[0][0], tokens(1)[1][0]),
        r"key must be \(batch, key heads, length, head_dim\)",
    ),
    "no tokens": (lambda c: c.update(*tokens(0)), r"not empty; got \(2, 2, 0, 6\)"),
    "key longer than value": (
        lambda c: c.update(tokens(2)[0], tokens(1)[1]),
        r"value must be \(2, 2, 2, head_dim\).*got \(2, 2, 1, 5\)",
    ),
    "value of other heads": (
        lambda c: c.update(tokens(1)[0], tokens(1, heads=1)[1]),
        r"value must be \(2, 2, 1, head_dim\).*got \(2, 1, 1, 5\)",
    ),
    "value without features": (
        lambda c: c.update(tokens(1)[0], tokens(1)[1][..., :0]),
        r"not empty; got \(2, 2, 1, 0\)",
    ),
    "value of another dtype": (
        lambda c: c.update(tokens(1)[0], tokens(1)[1].float()),
        "value must have the key's dtype and device",
    ),
    "value on another device": (
        lambda c: c.update(tokens(1)[0], tokens(1)[1].to("meta")),
        "must have the key's dtype and device, torch.float64 on cpu; got torch.float64 on meta",
    ),
    "padding of another shape": (
        lambda c: c.update(*tokens(2), torch.zeros(2, 4, dtype=torch.bool)),
        r"key_padding_mask must have shape \(2, 2\) or \(2, 5\); got \(2, 4\)",
    ),
    "reorder: wrong length": (
        lambda c: c.reorder(torch.tensor([0])),
        r"index must have shape \(2,\), one a sequence; got \(1,\)",
    ),
    "reorder: out of range": (
        lambda c: c.reorder(torch.tensor([0, 2])),
        r"index must lie in \[0, 2\); got values from 0 to 2",
    ),
    "reorder: negative": (
        lambda c: c.reorder(torch.tensor([-1, 0])),
        r"index must lie in \[0, 2\); got values from -1 to 0",
    ),
    "reorder: floats": (
        lambda c: c.reorder(torch.tensor([0.0, 1.0])),
        "index must be integers; got torch.float32",
    ),
    "reorder: bools": (
        lambda c: c.reorder(torch.tensor([False, True])),
        "index must be integers; got torch.bool",
    ),
    "select: two dimensions": (
        lambda c: c.select(torch.tensor([[0, 1]])),
        r"rows must name at least one sequence; got shape \(1, 2\)",
    ),
    "select: nothing": (
        lambda c: c.select(torch.tensor([False, False])),
        "rows must name at least one sequence",
    ),
    "select: mask of another length": (
        lambda c: c.select(torch.tensor([True, False, True])),
        r"bool rows must have shape \(2,\); got \(3,\)",
    ),
    "select: out of range": (
        lambda c: c.select(torch.tensor([5])),
        r"rows must lie in \[0, 2\); got values from 5 to 5",
    ),
    "crop beyond the length": (
        lambda c: c.crop(4),
        r"length must be in \[0, 3\], the tokens in the cache; got 4",
    ),
    "crop to less than nothing": (lambda c: c.crop(-1), r"length must be in \[0, 3\]"),
    "rollback with nothing open": (lambda c: c.rollback(), r"rollback\(\) needs an open fork"),
    "commit with nothing open": (lambda c: c.commit(), r"commit\(\) needs an open fork"),
    "state of another kind": (
        lambda c: c.load_state_dict({"kind": "OtherCache"}),
        "state must be that of a .*Cache; got that of OtherCache",
    ),
    "state of nothing": (
        lambda c: c.load_state_dict({}),
        "state must be that of a .*Cache; got that of something else",
    ),
    "state with a key too many": (
        lambda c: c.load_state_dict(c.state_dict() | {"more": 1}),
        "state must have the keys",
    ),
    "state with the wrong shape": (
        lambda c: c.load_state_dict(
            {
                name: part[..., :2] if isinstance(part, Tensor) else part
                for name, part in c.state_dict().items()
            }
        ),
        r"state\['.*'\] must be",
    ),
    "state of another dtype": (
        lambda c: c.load_state_dict(
            {
                name: part.half() if isinstance(part, Tensor) and part.dim() == 4 else part
                for name, part in c.state_dict().items()
            }
        ),
        r"state\['key.*'\] must be .*got torch.float16",
    ),
    "state with fewer values than keys": (
        lambda c: c.load_state_dict(
            {
                name: part[:, :, :2] if name.startswith("value") else part
                for name, part in c.state_dict().items()
            }
        ),
        r"state\['value.*'\] must be",
    ),
    "state with padding of another length": (
        lambda c: c.load_state_dict(c.state_dict() | {"padding": torch.zeros(2, 2)}),
        r"state\['padding'\] must be torch.float32 \(2, 3\)",
    ),
    "state with padding of three dimensions": (
        lambda c: c.load_state_dict(c.state_dict() | {"padding": torch.zeros(2, 3, 1)}),
        r"state\['padding'\] must be torch.float32 \(2, 3\).*got torch.float32 \(2, 3, 1\)",
    ),
    "state with an origin of another batch": (
        lambda c: c.load_state_dict(c.state_dict() | {"origin": torch.tensor([1])}),
        r"state\['origin'\] must be torch.int64 \(2,\)",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("name", NAMES)
def test_a_refusal_says_why_and_changes_nothing(name: str, refusal: str) -> None:
    cache = filled(name)
    before, nbytes = cache.state_dict(), cache.nbytes
    act, words = REFUSALS[refusal]
    with pytest.raises(ValueError, match=words):
        act(cache)
    assert same(before, cache.state_dict())
    assert cache.nbytes == nbytes
    assert cache.length == 3
    with pytest.raises(ValueError, match="needs an open fork"):
        cache.rollback()


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_refused_padding_mask_of_integers_changes_nothing(name: str, length: int) -> None:
    cache = filled(name)
    before = cache.state_dict()
    with pytest.raises(TypeError, match="key_padding_mask must be bool or floating point"):
        cache.update(*tokens(1), torch.zeros(2, length, dtype=torch.int64))
    assert same(before, cache.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_padding_for_all_tokens_replaces_what_was_remembered(name: str) -> None:
    cache = filled(name)
    padding = torch.tensor([[False, True, False, True, True], [True, False, False, False, False]])
    cached = cache.update(*tokens(2), padding)
    assert cached.key.shape[2] == cache.length == 5
    assert torch.equal(cached.padding, padding)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_taken_back_was_never_there(name: str, count: int) -> None:
    cache = filled(name)
    cache.update(*tokens(6))
    before = cache.state_dict()
    # Padding of the new tokens, and of all.
    for length in (count, 9 + count):
        padding = torch.ones(2, length, dtype=torch.bool)
        cache.update(*tokens(count), padding, origin=torch.tensor([3]))
        cache.take_back()
        assert same(before, cache.state_dict())


@pytest.mark.parametrize("undo", ["take_back", "crop"])
@pytest.mark.parametrize("name", ["dynamic", "static", "rolling", "rolling with sinks"])
def test_what_is_gone_and_written_over_counts_as_changed(name: str, undo: str) -> None:
    cache = filled(name)
    seen = cache.update(*tokens(1))
    versions = seen.key._version, seen.value._version
    cache.crop(cache.length)
    assert (seen.key._version, seen.value._version) == versions
    cache.crop(3) if undo == "crop" else cache.take_back()
    cache.update(*tokens(1))
    assert seen.key._version > versions[0]
    assert seen.value._version > versions[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", [*NAMES, "cross"])
def test_sequences_are_named_by_any_integers(name: str, dtype: torch.dtype) -> None:
    found, expected = (cross() if name == "cross" else filled(name) for _ in range(2))
    expected.load_state_dict(found.state_dict())
    for operation, rows in (("reorder", [1, 0]), ("select", [0, 1, 1])):
        new = tokens(1, batch=len(rows))
        for cache, index in ((found, torch.tensor(rows, dtype=dtype)), (expected, rows)):
            getattr(cache, operation)(torch.as_tensor(index))
            cache.update(*new)
        states = [cache.state_dict() for cache in (found, expected)]
        assert same(*(state.get("tensors", state) for state in states))


@pytest.mark.parametrize("name", NAMES)
def test_a_fork_keeps_what_is_cropped_and_written_over(name: str) -> None:
    cache = filled(name)
    cache.update(*tokens(1), origin=torch.tensor([3]))
    before = cache.state_dict()
    cache.fork()
    cache.crop(1)
    cache.update(*tokens(2), origin=torch.tensor([8]))
    cache.rollback()
    assert same(before, cache.state_dict())


def test_unequal_states_are_not_the_same() -> None:
    cache = filled("dynamic")
    before = cache.state_dict()
    assert not same(before, before | {"key": before["key"] + 1})
    assert not same(before, before | {"padding": None})
    assert not same(before, {**before, "more": 1})


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_is_a_copy_and_survives_saving(name: str, tmp_path) -> None:
    cache = filled(name)
    state = cache.state_dict()
    torch.save(state, tmp_path / "cache.pt")
    cache.crop(1)
    cache.update(*tokens(4))
    cache.fork()
    cache.load_state_dict(torch.load(tmp_path / "cache.pt"))
    assert same(state, cache.state_dict())
    assert cache.length == 3
    with pytest.raises(ValueError, match="needs an open fork"):
        cache.rollback()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_counted_with_those_of_the_padding(name: str) -> None:
    plain = KINDS[name].make(2)
    plain.update(*tokens(3))
    assert 2 * 3 <= filled(name).nbytes - plain.nbytes <= 2 * 24


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_is_a_copy_too(name: str) -> None:
    cache = KINDS[name].make(2)
    padding = torch.tensor([[True, False, False], [False, True, False]])
    cache.update(*tokens(3), padding, origin=torch.tensor([2, 3]))
    state, kept = cache.state_dict(), cache.state_dict()
    cache.load_state_dict(state)
    for tensor in state.values():
        if isinstance(tensor, Tensor):
            tensor.zero_()
    assert same(cache.state_dict(), kept)


@pytest.mark.parametrize("name", NAMES)
def test_modes_of_autograd_may_change_between_steps(name: str) -> None:
    with torch.inference_mode():
        cache = KINDS[name].make(2)
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode]
    for mode in [*modes, torch.no_grad]:
        with mode():
            cache.fork()
            cache.update(*tokens(2), torch.tensor([[True, False], [False, False]]))
            cache.rollback()
            cache.update(*tokens(2), torch.tensor([[True, False], [False, False]]))
            cache.reorder(torch.tensor([1, 1]))
            cache.crop(cache.length - 1) if cache.length < 4 else None
    assert cache.length >= 6


@pytest.mark.parametrize("name", NAMES)
def test_forks_nest(name: str) -> None:
    cache = filled(name)
    before = cache.state_dict()
    cache.fork()
    cache.update(*tokens(1))
    middle = cache.state_dict()
    cache.fork()
    cache.reorder(torch.tensor([1, 0]))
    cache.update(*tokens(5))
    cache.rollback()
    assert same(middle, cache.state_dict())
    cache.fork()
    cache.update(*tokens(1))
    cache.commit()
    assert cache.length == 5
    cache.rollback()
    assert same(before, cache.state_dict())


# torch's forward mode uses it itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", [n for n in NAMES if n != "dynamic"])
def test_a_gradient_is_not_lost_in_silence(name: str) -> None:
    cache = KINDS[name].make(2)
    key, value = tokens(2)
    with pytest.raises(ValueError, match="keeps no gradient"):
        cache.update(key.requires_grad_(), value)
    assert cache.length == 0
    with torch.no_grad():
        assert not cache.update(key, value).key.requires_grad
    cache.reset()
    with forward_ad.dual_level(), pytest.raises(ValueError, match="keeps no forward-mode"):
        cache.update(forward_ad.make_dual(key, key), value)


@pytest.mark.parametrize("name", [*NAMES, "cross"])
def test_an_empty_cache_has_nothing_to_change(name: str) -> None:
    cache = CrossCache() if name == "cross" else KINDS[name].make(2)
    cache.take_back()
    cache.reorder(torch.tensor([1, 0]))
    cache.select(torch.tensor([2]))
    cache.crop(0)
    assert (cache.length, cache.nbytes) == (0, 0)


@pytest.mark.parametrize("begin", [[4], [4, 7]])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_count_from_where_the_first_of_them_did(name: str, begin: list[int]) -> None:
    cache, first, other = KINDS[name].make(2), torch.tensor(begin), torch.tensor([9])
    assert cache.origin(first) is first
    cache.update(*tokens(2), origin=first)
    cache.reorder(torch.tensor([1, 0]))
    cache.crop(1)
    assert cache.origin(other).tolist() == [begin[-1], 4]
    # Nothing is left of those that counted from there.
    cache.crop(0)
    assert cache.origin(other) is other


def test_a_dynamic_cache_keeps_the_gradient() -> None:
    cache = DynamicCache()
    key, value = tokens(4)
    key.requires_grad_()
    parts = zip(key.split([2, 1, 1], dim=2), value.split([2, 1, 1], dim=2), strict=True)
    found = [cache.update(*part).key for part in parts]
    sum(f.sum() for f in found).backward()
    assert torch.equal(key.grad[0, 0, :, 0], torch.tensor([3.0, 3, 2, 1], dtype=torch.float64))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_gradient_is_there_again_after_a_step_without_it_failed(earlier: bool) -> None:
    cache = DynamicCache()
    for requires_grad in (earlier, not earlier):
        key, value = tokens(3)
        with torch.set_grad_enabled(requires_grad):
            cache.update(key.requires_grad_(requires_grad), value)
    cache.take_back()
    assert cache.key.requires_grad == earlier


def test_kinds_of_protocol() -> None:
    assert isinstance(DictCache({}), Cache)
    assert not isinstance(DictCache({}), DecodingCache)
    assert not isinstance(CrossCache(), Cache)
    for name in NAMES:
        assert isinstance(KINDS[name].make(2), DecodingCache)


@pytest.mark.parametrize("name", NAMES)
def test_moving_to_where_it_is_changes_nothing(name: str) -> None:
    cache = filled(name)
    cache.fork()
    before = cache.state_dict()
    assert cache.to("cpu") is cache
    cache.update(*tokens(1))
    cache.rollback()
    assert same(before, cache.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("paged")])
def test_moving_to_another_device(name: str) -> None:
    cache = filled(name)
    cache.fork()
    before = cache.state_dict()
    assert cache.to("cuda") is cache
    key, value = tokens(1)
    assert cache.update(key.cuda(), value.cuda()).key.device.type == "cuda"
    cache.rollback()
    cache.to("cpu")
    assert same(before, cache.state_dict())


def test_arguments_of_constructors_are_checked() -> None:
    with pytest.raises(ValueError, match="max_length must be positive; got 0"):
        StaticCache(0)
    with pytest.raises(ValueError, match="window must be at least 1 and sinks at least 0; got 0"):
        RollingCache(0)
    with pytest.raises(ValueError, match="and sinks at least 0; got 3 and -1"):
        RollingCache(3, -1)
    with pytest.raises(ValueError, match="bits must be 8 or 4; got 2"):
        QuantizedCache(2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StaticCache(7.5), "max_length must be an integer; got float"),
        (lambda: StaticCache("8"), "max_length must be an integer; got str"),
        (lambda: RollingCache(2.5), "window must be an integer; got float"),
        (lambda: RollingCache(3, 1.0), "sinks must be an integer; got float"),
        (lambda: QuantizedCache(8.0), "bits must be an integer; got float"),
        (lambda: new_pool(2.5, 2), "num_pages must be an integer; got float"),
        (lambda: new_pool(2, "2"), "page_size must be an integer; got str"),
        (lambda: new_pool(2, 2, value_dim=3.5), "value_dim must be an integer; got float"),
    ],
)
def test_types_of_arguments_of_constructors_are_checked(
    make: Callable[[], object], words: str
) -> None:
    with pytest.raises(TypeError, match=f"^{words}$"):
        make()


def cross() -> CrossCache:
    cache = CrossCache()
    cache.update(*tokens(3))
    return cache


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda c: c.reorder([1, 0]), "index must be a tensor; got list"),
        (lambda c: c.select([1]), "rows must be a tensor; got list"),
        (lambda c: c.crop(2.5), "length must be an integer; got float"),
        (lambda c: c.crop("2"), "length must be an integer; got str"),
    ],
)
@pytest.mark.parametrize("name", [*NAMES, "cross"])
def test_types_of_arguments_are_checked(
    name: str, act: Callable[[DecodingCache | CrossCache], object], words: str
) -> None:
    cache = cross() if name == "cross" else filled(name)
    before = cache.state_dict()
    with pytest.raises(TypeError, match=f"^{words}$"):
        act(cache)
    after = cache.state_dict()
    assert same(before.get("tensors", before), after.get("tensors", after))


@pytest.mark.parametrize("name", ["static", "paged"])
def test_a_full_cache_says_so_and_goes_on_once_there_is_room(name: str) -> None:
    if name == "static":
        cache: DecodingCache = StaticCache(4)
        words = "max_length=4 holds 3 tokens and has no room for 2 more"
    else:
        cache = PagedCache(new_pool(4, 2))
        words = "2 more pages are needed, but the pool has 0 of its 4 left; free some"
    key, value = tokens(5)
    cache.update(key[:, :, :3], value[:, :, :3])
    before = cache.state_dict()
    with pytest.raises(CacheFullError, match=words):
        cache.update(key[:, :, 3:], value[:, :, 3:])
    assert same(before, cache.state_dict())
    cache.crop(2)
    assert torch.equal(cache.update(key[:, :, 3:], value[:, :, 3:]).key[:, :, 2:], key[:, :, 3:])
