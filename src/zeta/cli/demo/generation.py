"""The second part of `zeta demo`: the language model writes, with its cache and without."""

import time

import torch
from torch import Tensor

from zeta.cli.demo.sizes import Sizes
from zeta.cli.terminal import heading, number_row, row
from zeta.examples.byte_text import ByteText
from zeta.examples.language_model import LanguageModel, continue_text

TOLERANCE = 1e-3
"""Largest difference of logits, which span some tens, that rounding may make."""

SAMPLE_WIDTH = 92


def compare(model: LanguageModel, text: ByteText, sizes: Sizes, seed: int) -> bool:
    """Generate with and without the cache; print a sample, both speeds and the difference.

    Returns:
        Whether the logits of both agree.
    """
    heading("2  Generation, byte by byte")
    prompt = _lines_of(text.held_out, sizes.prompt_bytes)
    timed = {
        use_cache: _timed(model, prompt, sizes.new_bytes, seed, use_cache=use_cache)
        for use_cache in (True, False)
    }
    written, logits_NV, seconds = timed[True]
    row("sample", f"{len(prompt)} held-out bytes, then ▶ and {len(written)} of the model's own")
    for line in (_readable(prompt) + "▶" + _readable(written)).split("\n"):
        for start in range(0, max(1, len(line)), SAMPLE_WIDTH):
            print(f"    │ {line[start : start + SAMPLE_WIDTH]}".rstrip())
    print()
    number_row(f"{len(written) / seconds:,.0f}", "bytes per second with the cache")
    number_row(
        f"{len(written) / timed[False][2]:,.0f}",
        "bytes per second without, reading the whole text for each",
    )
    with torch.no_grad():
        # The last byte was drawn, but nothing came after it.
        full_NV = model(torch.tensor([list(prompt + written)[:-1]]))[0, len(prompt) - 1 :]
    difference = (logits_NV - full_NV).abs().max().item()
    agrees = bool(difference <= TOLERANCE)
    number_row(
        f"{difference:.1e}",
        f"largest difference between logits with the cache and of one full pass "
        f"({'agree' if agrees else 'DISAGREE'}: limit {TOLERANCE:.0e})",
    )
    return agrees


def _timed(
    model: LanguageModel, prompt: bytes, count: int, seed: int, *, use_cache: bool
) -> tuple[bytes, Tensor, float]:
    """The bytes, the logits that each was drawn from, and the seconds it took."""
    began = time.perf_counter()
    written, logits_NV = continue_text(model, prompt, count, seed=seed, use_cache=use_cache)
    return written, logits_NV, time.perf_counter() - began


def _lines_of(text: bytes, count: int) -> bytes:
    """At most `count` bytes out of a text's middle, whole lines where there are any."""
    start = text.find(b"\n", len(text) // 2) + 1
    middle = text[start : start + count] or text[:count]
    return middle[: middle.rfind(b"\n") + 1] or middle


def _readable(text: bytes) -> str:
    """The text, with anything that a terminal might obey made visible."""
    characters = text.decode("utf-8", errors="replace").expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in characters)
