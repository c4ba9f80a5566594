"""Random histories of a cross-attention: each step equals the call without a cache.

Shapes: B batch, N queries, S source length, E embedding.
"""

import random
from typing import Any

import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

from tests.caches.histories import HISTORIES, Setting, refusal, same, settings
from zeta.caches import CrossCache
from zeta.nn import MultiheadAttention

EMBED, SPLIT = 8, 3


class CrossHistory:
    """A decoder's queries to an encoder's output; each sequence knows how many it has asked."""

    def __init__(self, setting: Setting, *, as_dict: bool) -> None:
        self.setting = setting
        self.random = random.Random(setting.seed)
        self.generator = torch.Generator().manual_seed(setting.seed)
        torch.manual_seed(setting.seed)
        self.attention = MultiheadAttention(
            {"multiway": setting.seed % 2 == 1},
            EMBED,
            setting.heads if EMBED % setting.heads == 0 else 4,
            encoder_decoder_attention=True,
            qk_norm="rms" if setting.heads == 2 else None,
            need_weights=False,
        )
        self.attention.double().eval()
        self.state: dict[str, Any] = {}
        self.cache = CrossCache(self.state if as_dict else None)
        self.as_dict = as_dict
        self.sources: list[tuple[Tensor, Tensor]] = []
        self.asked: list[int] = []
        self.forks: list[tuple[Any, Any]] = []
        self.steps = 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def begin(self) -> tuple[Tensor, Tensor]:
        batch, length = self.setting.batch, self.random.randint(1, 6)
        source = self.normal(batch, length, EMBED)
        padding = torch.rand(batch, length, generator=self.generator) < 0.3
        if self.setting.padding == "none":
            padding = torch.zeros_like(padding)
        self.sources = list(zip(source, padding, strict=True))
        self.asked = [0] * batch
        return source, padding

    def step(self, count: int) -> None:
        first = not self.sources
        source, padding = self.begin() if first else (None, None)
        # A decoder may bring the source again at any step, or leave it out.
        again = not first and self.random.random() < 0.5
        if again:
            source = torch.stack([row for row, _ in self.sources])
        x = self.normal(len(self.sources), count, EMBED)
        split = {"split_position": (SPLIT, 2)} if self.attention.multiway else {}
        state = self.state if self.as_dict else self.cache
        found, _ = self.attention(x, source, source, state, padding, **split)
        for b, (row, hidden) in enumerate(self.sources):
            options: dict[str, Any] = {"key_padding_mask": hidden[None], **split}
            if self.attention.multiway:
                options["positions"] = torch.arange(self.asked[b], self.asked[b] + count)
            expected, _ = self.attention(x[b : b + 1], row[None], row[None], **options)
            error = (found[b] - expected[0]).abs().max()
            assert error <= 1e-9, f"step {self.steps}: off by {error:.1e}"
            self.asked[b] += count
        self.steps += 1

    def take(self, operation: str) -> None:
        batch = len(self.sources)
        count = batch if operation == "reorder" else self.random.randint(1, 4)
        index = torch.tensor([self.random.randrange(batch) for _ in range(count)])
        getattr(self.cache, operation)(index)
        self.sources = [self.sources[b] for b in index.tolist()]
        self.asked = [self.asked[b] for b in index.tolist()]

    def perform(self, operation: str) -> None:
        if operation in ("one", "chunk", "long"):
            self.step({"one": 1, "chunk": self.random.randint(2, 5), "long": 11}[operation])
        elif operation in ("reorder", "select") and self.sources:
            self.take(operation)
        elif operation == "crop":
            length = self.random.randint(0, max(self.asked, default=0))
            self.cache.crop(length)
            self.asked = [min(length, asked) for asked in self.asked]
        elif operation == "fork":
            self.cache.fork()
            self.forks.append((list(self.sources), list(self.asked)))
        elif operation in ("commit", "rollback"):
            words = refusal(getattr(self.cache, operation))
            assert bool(words) == (not self.forks)
            if self.forks:
                kept = self.forks.pop()
                if operation == "rollback":
                    self.sources, self.asked = list(kept[0]), list(kept[1])
        elif operation == "reload":
            saved = self.cache.state_dict()
            self.cache.load_state_dict(saved)
            assert same(saved["tensors"], self.cache.state_dict()["tensors"])
            self.forks = []
        elif operation == "reset":
            self.cache.reset()
            self.sources, self.asked, self.forks = [], [], []


def test_any_history_of_a_cross_attention_equals_its_full_forward(num_histories: int) -> None:
    attended = 0

    @hypothesis_settings(max_examples=-(-num_histories // 20))
    @given(settings(), HISTORIES)
    def run(setting: Setting, operations: list[str]) -> None:
        nonlocal attended
        with torch.no_grad():
            history = CrossHistory(setting, as_dict=setting.seed % 3 == 0)
            for operation in operations:
                history.perform(operation)
        attended += history.steps

    run()
    assert attended > num_histories // 20


class KeepsItsOrder(CrossCache):
    def reorder(self, index: Tensor) -> None:
        pass


def test_a_wrong_cache_is_found() -> None:
    history = CrossHistory(Setting(3, 4, 2, "none", "none", "none", "inside", 2), as_dict=False)
    history.cache = KeepsItsOrder()
    words = ""
    with torch.no_grad():
        history.perform("one")
        try:
            for _ in range(9):
                history.perform("reorder")
                history.perform("chunk")
        except AssertionError as error:
            words = str(error)
    assert "off by" in words
