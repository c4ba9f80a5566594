"""The first part of `zeta demo`: a causal language model learns a text."""

import time

import torch

from zeta.cli.demo.sizes import Sizes
from zeta.cli.terminal import heading, number_row, progress, row
from zeta.examples.byte_text import ByteText, lzma_bits, unigram_bits
from zeta.examples.language_model import LanguageModel, bits_per_byte, window_loss
from zeta.examples.training import fit


def train(text: ByteText, sizes: Sizes, seed: int) -> LanguageModel:
    """Train the model, and print how well it predicts the held-out text.

    Returns:
        The trained model, in evaluation mode.
    """
    heading("1  A causal language model of bytes")
    learnt, judged = len(text.training), len(text.held_out)
    row("text", f"{text.name}: {learnt:,} bytes to learn, {judged:,} held out")
    torch.manual_seed(seed)
    model = LanguageModel(embed_dim=sizes.embed_dim, num_layers=sizes.num_layers)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    row(
        "model",
        f"{parameters:,} parameters, {sizes.num_layers} layers: sub-LN, T5 relative bias, dropout",
    )
    # Twice the window of the training: relative positions carry over.
    judged_window = 2 * sizes.window
    before = bits_per_byte(model.eval(), text.held_out, judged_window)
    training_N = torch.tensor(list(text.training))
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    losses = fit(
        model,
        lambda: window_loss(model, training_N, generator, sizes.batch, sizes.window),
        sizes.steps,
    )
    for _ in progress(losses, sizes.steps, "training"):
        pass
    seconds = time.perf_counter() - began
    row(
        "training",
        f"{sizes.steps} steps of {sizes.batch} x {sizes.window} bytes in {seconds:.0f} s",
    )
    print("\n  bits per byte of the held-out text", flush=True)
    number_row(f"{before:.3f}", "the model before training")
    number_row(
        f"{unigram_bits(text):.3f}", "unigram model: how often each byte is in the text to learn"
    )
    number_row(f"{lzma_bits(text, primed=False):.3f}", "lzma -9e, the held-out text alone")
    number_row(
        f"{lzma_bits(text, primed=True):.3f}",
        "lzma -9e, what the held-out text adds to the whole text to learn",
    )
    number_row(
        f"{bits_per_byte(model, text.held_out, judged_window):.3f}",
        f"the model after training, from the {sizes.window} to {judged_window} bytes before",
    )
    return model
