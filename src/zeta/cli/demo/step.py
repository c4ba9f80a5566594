"""The fourth part of `zeta demo`: a training step, beside attention as textbooks write it."""

import contextlib
import os
import sys
import textwrap
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zeta
from zeta.bench.memory import peak_bytes
from zeta.bench.timing import time_interleaved
from zeta.cli.demo.sizes import Sizes
from zeta.cli.terminal import heading, number_row, row
from zeta.examples.byte_text import ByteText
from zeta.examples.language_model import Block, LanguageModel
from zeta.examples.textbook import TextbookAttention
from zeta.examples.training import optimizers, training_step


def compare(model: LanguageModel, text: ByteText, sizes: Sizes, seed: int) -> None:
    """Time one training step of the trained model on both kinds of attention, and explain Zeta's.

    The model is trained further.
    """
    heading("4  One training step, on Zeta and on the textbook")
    torch.manual_seed(seed)
    textbook = LanguageModel(
        embed_dim=sizes.embed_dim, num_layers=sizes.num_layers, attention=TextbookAttention
    )
    textbook.load_state_dict(model.state_dict())
    textbook.eval()
    content = text.training[: sizes.step_bytes + 1]
    window_1T = torch.tensor([list(content)])
    length = len(content) - 1

    def zeta_loss() -> Tensor:
        return _loss(model(window_1T[:, :-1]), window_1T)

    def textbook_loss() -> Tensor:
        # Made once for all layers, as T5 does.
        rel_pos = textbook.rel_pos(1, length, length)
        return _loss(textbook(window_1T[:, :-1], rel_pos=rel_pos), window_1T)

    row("step", f"forward, backward and update, {length:,} bytes at a time, dropout on")
    with torch.no_grad():
        losses = [f"{loss().item():.6f}" for loss in (zeta_loss, textbook_loss)]
    row("same model", f"without dropout the losses are {losses[0]} and {losses[1]}")
    steps = {
        "Zeta": _step(model, zeta_loss),
        "the textbook": _step(textbook, textbook_loss),
    }
    timings = time_interleaved(steps, rounds=sizes.rounds, warmup=1)
    with _chatter_dropped():
        peaks = {name: peak_bytes(step, "cpu") for name, step in steps.items()}
    print()
    for name, timing in timings.items():
        number_row(f"{1000 * timing.median:,.0f} ms", f"a step on {name}")
    for name, peak in peaks.items():
        number_row(f"{peak / 2**20:,.0f} MiB", f"peak memory of a step on {name}")
    print("\n  zeta.explain() of the model's attention")
    for line in str(_explanation(model, length)).splitlines():
        print(textwrap.fill(f"    {line}", 100, subsequent_indent=8 * " "), flush=True)


@contextlib.contextmanager
def _chatter_dropped() -> Iterator[None]:
    """Drop what goes to standard error: torch's profiler reports each start and stop there."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _loss(logits_1TV: Tensor, window_1T: Tensor) -> Tensor:
    return F.cross_entropy(logits_1TV[0], window_1T[0, 1:])


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One training step of a model, to be called again and again."""
    model.train()
    both = optimizers(model, learning_rate=1e-4)
    return lambda: training_step(model, loss(), both)


def _explanation(model: LanguageModel, length: int) -> zeta.Explanation:
    """What the model's layers ask of the op in training."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    attention = block.attention
    assert isinstance(attention, zeta.nn.MultiheadAttention)
    query = torch.empty(1, attention.num_heads, length, attention.head_dim)
    return zeta.explain(
        query,
        query,
        query,
        mask=zeta.masks.Causal(),
        bias=model.rel_pos.value(),
        dropout_p=attention.dropout,
    )
