"""What every cache refuses, and that it is then what it was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.caches.histories import same
from tests.caches.interfaces import NAMES, cross, filled, tokens
from tests.caches.kinds import new_pool
from zeta.caches import (
    CacheFullError,
    CrossCache,
    DecodingCache,
    DictCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    RollingCache,
    StaticCache,
)

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
    "state with padding of integers": (
        lambda c: c.load_state_dict(
            c.state_dict() | {"padding": torch.zeros(2, 3, dtype=torch.int64)}
        ),
        r"state\['padding'\] must be torch.bool \(2, 3\).*got torch.int64",
    ),
    "state with padding that is no tensor": (
        lambda c: c.load_state_dict(c.state_dict() | {"padding": "none"}),
        r"state\['padding'\] must be torch.bool \(2, 3\).*got 'none'",
    ),
    "state with a form that is none": (
        lambda c: c.load_state_dict(c.state_dict() | {"form": 5}),
        r"state\['form'\] must be \(batch, .*; got 5",
    ),
    "state with a form that is too short": (
        lambda c: c.load_state_dict(c.state_dict() | {"form": c.state_dict()["form"][:4]}),
        r"state\['form'\] must be \(batch, .*; got \(2, ",
    ),
    "state with a form of no heads": (
        lambda c: c.load_state_dict(c.state_dict() | {"form": (2, 0, 4, 4, torch.float32)}),
        r"state\['form'\] must be \(batch, .*; got \(2, 0, ",
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


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda c: c.update([1.0], tokens(1)[1]), "key must be a tensor; got list"),
        (lambda c: c.update(tokens(1)[0], None), "value must be a tensor; got NoneType"),
        (
            lambda c: c.update(*tokens(1), [[True], [False]]),
            "key_padding_mask must be a tensor; got list",
        ),
        (lambda c: c.load_state_dict(None), "state must be that of a .*Cache; got NoneType"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_refused_type_changes_nothing(
    name: str, act: Callable[[DecodingCache], object], words: str
) -> None:
    cache = filled(name)
    before = cache.state_dict()
    with pytest.raises(TypeError, match=words):
        act(cache)
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
        (lambda: PagedCache(None), "pool must be a PagePool; got NoneType"),
        (lambda: PagedCache(PagePool), "pool must be a PagePool; got type"),
        (lambda: DictCache([]), "state must be a dict; got list"),
        (lambda: CrossCache([]), "state must be a dict; got list"),
        (
            lambda: PagePool(2, 2, num_kv_heads=1, head_dim=4, dtype=torch.int64),
            "dtype must be a floating-point dtype; got torch.int64",
        ),
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
