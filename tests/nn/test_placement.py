"""Where tokens stand that follow those of a cache, also where its sequences differ in length."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nn.attentions import EXACT, E, make, tokens
from zeta.caches import DynamicCache, PagedCache, PagePool, StaticCache
from zeta.nn import RotaryEmbedding

CHARACTERS: dict[str, dict[str, Any]] = {
    "rotation": {"position": RotaryEmbedding(4)},
    "multiway": {"args": {"multiway": True}},
}


def paged() -> PagedCache:
    return PagedCache(PagePool(32, 2, num_kv_heads=4, head_dim=4, dtype=torch.float64))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("character", CHARACTERS)
@torch.no_grad()
def test_a_plain_attention_follows_sequences_of_different_lengths(
    character: str, given: bool
) -> None:
    module = make(**CHARACTERS[character])
    own = make(**CHARACTERS[character], self_attention=True)
    own.load_state_dict(module.state_dict())
    prompt, lengths = tokens(6), torch.tensor([6, 3, 1])
    padding = torch.arange(6) >= lengths[:, None]
    options: dict[str, Any] = {"split_position": 4} if character == "multiway" else {}
    caches = paged(), paged()
    for m, cache in zip((own, module), caches, strict=True):
        m(prompt, prompt, prompt, cache, padding, is_causal=True, **options)
    for length in (1, 2):
        x = tokens(length)
        expected = own(x, x, x, caches[0], is_causal=True, **options)[0]
        if given:
            options["positions"] = lengths[:, None] + torch.arange(length)
        found = module(x, x, x, caches[1], is_causal=True, **options)[0]
        options.pop("positions", None)
        lengths = lengths + length
        torch.testing.assert_close(found, expected, **EXACT)


class _Counted(nn.Linear):
    """A layer that notes how many tokens it has met."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[1]
        return super().forward(x)


@pytest.mark.parametrize("make_cache", [dict, DynamicCache, lambda: StaticCache(8), paged])
@torch.no_grad()
def test_a_way_computes_only_its_own_tokens_behind_any_cache(make_cache: Any) -> None:
    module = make(args={"multiway": True}, self_attention=True)
    for way in "AB":
        setattr(module.out_proj, way, _Counted(E, E, dtype=torch.float64))
    cache = make_cache()
    for x in tokens(5).split([3, 2], dim=1):
        module(x, x, x, cache, split_position=2)
    assert [module.out_proj.A.seen, module.out_proj.B.seen] == [2, 3]


def test_a_split_is_one_or_a_pair() -> None:
    x, one = tokens(3), tokens(3)[0]
    module = make(args={"multiway": True}, self_attention=True)
    for given in (x, one):
        with pytest.raises(ValueError, match=r"split_position must be one, or a pair.* got 3"):
            module(given, given, given, split_position=(1, 2, 3))
