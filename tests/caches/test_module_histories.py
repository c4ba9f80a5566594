"""The same histories through `MultiheadAttention`: its projections, rotations, biases and ways."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

from tests.caches.histories import (
    HISTORIES,
    History,
    Row,
    Setting,
    refusal,
    same,
    settings,
    snapshot,
)
from tests.caches.kinds import KINDS, PlainDict, new_pool, sinks_and_window
from zeta import masks
from zeta.caches import CacheFullError, DynamicCache, PagedCache, RollingCache, StaticCache
from zeta.nn import ALiBi, MultiheadAttention, RelativePositionBias, RotaryEmbedding

EMBED, HEADS, HEAD_DIM, SPLIT = 8, 4, 2, 3


def module(setting: Setting) -> MultiheadAttention:
    """An attention of the kind that a setting asks for; every second one is multiway."""
    multiway = setting.seed % 2 == 1
    position = RotaryEmbedding(HEAD_DIM) if setting.rotation.startswith("rope") else None
    config = {
        "multiway": multiway,
        "xpos_rel_pos": setting.rotation == "xpos",
        # With the smallest, a history of some tens of tokens has several anchors.
        "xpos_scale_base": 16 if setting.seed % 3 else 0.1,
    }
    torch.manual_seed(setting.seed)
    attention = MultiheadAttention(
        config,
        EMBED,
        HEADS,
        self_attention=True,
        subln=setting.heads == 3,
        num_kv_heads=2 if setting.heads == 4 else HEADS,
        position=position,
        window=3 if setting.mask == "window" else None,
        qk_norm="rms" if setting.heads == 2 else None,
        need_weights=False,
    )
    return attention.double().eval()


class ModuleHistory(History):
    """A history whose tokens are embeddings, attended to by a module."""

    def __init__(self, setting: Setting, **options: Any) -> None:
        super().__init__(setting, **options)
        self.attention = module(setting)
        rotates = self.attention.xpos is not None
        self.start = (1_000_000 if setting.seed % 5 == 0 else 0) if rotates else None
        self.rel_pos = {
            "alibi": ALiBi(HEADS),
            "t5": RelativePositionBias(
                bidirectional=False, num_buckets=16, n_heads=HEADS, max_distance=16
            ),
            "t5 both ways": RelativePositionBias(num_buckets=16, n_heads=HEADS, max_distance=16),
        }.get(setting.bias)
        if self.rel_pos is not None:
            self.rel_pos = self.rel_pos.double()

    def forward(self, x: Tensor, padding: Tensor | None, numbers: Tensor, **options: Any) -> Tensor:
        """Attend.

        Args:
            x: Tokens.
            padding: Theirs.
            numbers: Where they stand in the order.
            options: Of the module.
        """
        split = {"split_position": SPLIT} if self.attention.multiway else {}
        if self.start:
            options["positions"] = numbers + self.start
        out, _ = self.attention(
            x,
            x,
            x,
            key_padding_mask=padding,
            rel_pos=self.rel_pos,
            is_causal=self.setting.mask != "none",
            **split,
            **options,
        )
        return out

    def attend(self, query: Tensor, tokens: Tensor, rel_pos: Any) -> Tensor:
        """The output of the last tokens; keys and values of all go to the cache."""
        state = self.cache.state if isinstance(self.cache, PlainDict) else self.cache
        split = {"split_position": SPLIT} if self.attention.multiway else {}
        out, _ = self.attention(
            query, tokens, tokens, state, rel_pos=rel_pos, is_causal=True, **split
        )
        return out

    def update(self, added: int) -> None:
        batch = len(self.ledger) or self.setting.batch
        x, padding = self.normal(batch, added, EMBED), self.new_padding(batch, added)
        before = snapshot(self.cache)
        state = self.cache.state if isinstance(self.cache, PlainDict) else self.cache
        numbers = self.cache.next_positions(added, x.device)
        try:
            out = self.forward(x, padding, numbers, incremental_state=state)
        except CacheFullError:
            assert same(before, snapshot(self.cache))
            return
        marks = torch.zeros(batch, added, dtype=torch.bool) if padding is None else padding
        counts = [added] * batch
        if self.drops and padding is not None:
            counts = [int((~row).nonzero().max()) + 1 if (~row).any() else 0 for row in marks]
        empty = Row(*[x[0, None, :0]] * 3, torch.zeros(0, dtype=torch.bool))
        self.ledger = self.ledger or [empty] * batch
        for b, count in enumerate(counts):
            new = Row(*[x[b, None]] * 3, marks[b]).cut(count)
            row = self.ledger[b] = self.ledger[b].extended(new)
            if count:
                numbers = torch.arange(row.length)[None]
                expected = self.forward(
                    row.key, row.padding[None], numbers, attn_mask=self.kept_mask
                )
                error = (out[b, :count] - expected[0, row.length - count :]).abs().max()
                assert error <= 1e-9, f"step {self.steps}: off by {error:.1e}"
        self.steps += 1


def options(kind: str, setting: Setting) -> dict[str, Any]:
    heads = module(setting).num_kv_heads
    if kind == "paged":
        pool = new_pool(100, 3, key_heads=heads, head_dim=HEAD_DIM, value_dim=HEAD_DIM)
        dropped = setting.padding != "float"
        return {"make": lambda: PagedCache(pool), "drops_trailing_padding": dropped}
    return {
        "dict": {"make": PlainDict},
        "dynamic": {"make": DynamicCache},
        "static": {"make": lambda: StaticCache(24)},
        "rolling": {"make": lambda: RollingCache(4), "mask": masks.SlidingWindow(4)},
        "rolling with sinks": {
            "make": lambda: RollingCache(3, 2),
            "mask": sinks_and_window(2, 3),
        },
    }[kind]


MODULE_KINDS = ("dict", "dynamic", "static", "rolling", "rolling with sinks", "paged")


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_any_history_of_a_module_equals_its_full_forward(kind: str, num_histories: int) -> None:
    assert kind in KINDS
    examples = -(-num_histories // len(MODULE_KINDS) // 4)

    @hypothesis_settings(max_examples=examples)
    @given(settings(), HISTORIES)
    def run(setting: Setting, operations: list[str]) -> None:
        with torch.no_grad():
            history = ModuleHistory(setting, **options(kind, setting))
            for operation in operations:
                history.perform(operation)

    run()


@pytest.mark.parametrize("bias", ["none", "t5"])
@pytest.mark.parametrize("seed", [2, 3], ids=["one way", "multiway"])
@pytest.mark.parametrize("rotation", ["none", "rope", "xpos"])
@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_queries_may_be_the_last_of_the_tokens(
    kind: str, rotation: str, seed: int, bias: str
) -> None:
    setting = Setting(2, 4, 2, "causal", bias, rotation, "none", seed)
    whole, last = (ModuleHistory(setting, **options(kind, setting)) for _ in range(2))
    with torch.no_grad():
        for count, of_them in ((5, 2), (4, 1), (6, 6), (3, 2)):
            x = torch.randn(2, count, EMBED, dtype=torch.float64)
            found = [
                history.attend(x[:, -queries:], x, history.rel_pos)
                for history, queries in ((whole, count), (last, of_them))
            ]
            torch.testing.assert_close(found[1], found[0][:, -of_them:])
        if kind != "dict" and (rotation != "none" or seed == 3):
            with pytest.raises(ValueError, match="3 queries and 2 keys"):
                last.attend(x, x[:, :2], None)


def test_a_wrong_module_is_found() -> None:
    setting = Setting(2, 4, 2, "causal", "t5", "rope", "inside", 8)
    history = ModuleHistory(setting, make=DynamicCache)
    with torch.no_grad():
        history.update(3)
        history.attention.v_proj.weight.mul_(1 + 1e-6)
        words = ""
        try:
            history.update(1)
        except AssertionError as error:
            words = str(error)
    assert "off by" in words
    assert refusal(lambda: None) == ""
