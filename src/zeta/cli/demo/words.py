"""The third part of `zeta demo`: an encoder-decoder learns to write numbers as English words."""

import random
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from zeta import plots
from zeta.cli.demo.sizes import Sizes
from zeta.cli.terminal import INSTALL, InputError, heading, is_installed, number_row, progress, row
from zeta.examples import numbers_to_words as task
from zeta.examples.encoder_decoder import EncoderDecoder
from zeta.examples.training import fit

BATCH = 128
EXAMPLES = 3
PICTURE = "cross-attention.png"


def train(sizes: Sizes, seed: int, output: Path) -> Path | None:
    """Train the model, print how many held-out numbers it writes without a mistake, and draw one.

    Returns:
        The picture's path; None where matplotlib is missing.
    """
    heading("3  An encoder-decoder that writes numbers as words")
    rng = random.Random(seed)
    digits = sizes.max_digits
    held_out: list[int] = []
    while len(held_out) < sizes.held_out_numbers:
        # Of shorter ones there are too few to spare.
        held_out += task.draw(1, rng, min_digits=3, max_digits=digits, excluded=held_out)
    excluded = set(held_out)
    torch.manual_seed(seed)
    model = EncoderDecoder(len(task.DIGITS), len(task.WORDS), embed_dim=96)
    row(
        "task",
        f"numbers of up to {digits} digits; {len(held_out)} of 3 to {digits} digits are held out",
    )

    def loss() -> Tensor:
        numbers = task.draw(BATCH, rng, min_digits=1, max_digits=digits, excluded=excluded)
        target_BT = task.encode_words(numbers)
        logits_BTV = model(task.encode_digits(numbers), target_BT[:, :-1])
        return F.cross_entropy(
            logits_BTV.flatten(0, 1), target_BT[:, 1:].flatten(), ignore_index=task.PAD
        )

    began = time.perf_counter()
    for _ in progress(fit(model, loss, sizes.word_steps), sizes.word_steps, "training"):
        pass
    seconds = time.perf_counter() - began
    row("training", f"{sizes.word_steps} steps of {BATCH} numbers in {seconds:.0f} s")
    written = _write(model, held_out)
    right = [
        words == task.to_words(number) for number, words in zip(held_out, written, strict=True)
    ]
    print()
    number_row(
        f"{100 * sum(right) / len(right):.1f} %", "of the held-out numbers without a mistake"
    )
    for number, words, is_right in list(zip(held_out, written, right, strict=True))[:EXAMPLES]:
        number_row(f"{number:,}", task.phrase(words) + ("" if is_right else "  (wrong)"))
    known = [number for number, is_right in zip(held_out, right, strict=True) if is_right]
    longest = max(known or held_out, key=lambda number: len(task.to_words(number)))
    return _draw(model, longest, output)


def _write(model: EncoderDecoder, numbers: list[int]) -> list[list[str]]:
    """The words that the model writes for each number."""
    ids_BT = model.write(task.encode_digits(numbers), task.START, task.MAX_WORDS + 1)
    return [task.decode_words(ids) for ids in ids_BT.tolist()]


@torch.no_grad()
def _draw(model: EncoderDecoder, number: int, output: Path) -> Path | None:
    """Save what each word looks at, averaged over the heads of the last layer."""
    if not is_installed("matplotlib"):
        row("picture", f"none without matplotlib: {INSTALL}")
        return None
    source_1S = task.encode_digits([number])
    words = _write(model, [number])[0]
    target_1T = torch.tensor([[task.START, *(task.WORD_IDS[word] for word in words)]])
    _, weights = model.decode(target_1T, *model.encode(source_1S))
    figure = plots.attention_map(
        weights[-1].mean(dim=0)[0],
        [*words, "<end>"],
        [*str(number), "<end>"],
        title=f"Cross-attention while writing {number:,}\n(last layer, mean of the heads)",
        target_title="word being written",
        source_title="digits read",
    )
    path = output / PICTURE
    try:
        plots.save(figure, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    return path
