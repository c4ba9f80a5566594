"""`Ring`: which slots the tokens of a `RollingCache` take, and who may see them.

Shapes: B batch, K tokens kept, N any tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from zeta.masks import Causal, Mask, Padding, SlidingWindow


class Ring(NamedTuple):
    """Slots for the first ``sinks`` tokens, and behind them ``window`` that the others share."""

    window: int
    sinks: int

    @property
    def num_slots(self) -> int:
        """Slots in all."""
        return self.sinks + self.window

    def slots_of(self, position_N: Tensor) -> Tensor:
        """Where tokens go, ``(N,)``: behind the sinks they take turns."""
        turn_N = self.sinks + (position_N - self.sinks) % self.window
        return torch.where(position_N < self.sinks, position_N, turn_N)

    def positions_kept(self, length: int, device: torch.device) -> Tensor:
        """The position in each slot that is filled after ``length`` tokens, ``(K,)``."""
        slot_K = torch.arange(min(length, self.num_slots), device=device)
        if length <= self.num_slots:
            return slot_K
        last_K = length - 1 - (length - 1 - slot_K) % self.window
        return torch.where(slot_K < self.sinks, slot_K, last_K)

    def mask(self, batch: int, device: torch.device) -> Mask:
        """What a query may see."""
        window = SlidingWindow(self.window)
        if not self.sinks:
            return window
        lengths_B = torch.full((batch,), self.sinks, device=device)
        return window | (Causal() & Padding(lengths_B))
