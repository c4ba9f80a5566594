"""How much `zeta demo` does: all in a few minutes on two cores, or with ``--quick`` in one."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of models, texts and trainings.

    Attributes:
        training_bytes: Most bytes of text to learn from.
        held_out_bytes: Most bytes of text to be judged by.
        embed_dim: Width of the language model.
        num_layers: Its layers.
        batch: Windows in a training step.
        window: Bytes in a window.
        steps: Training steps of the language model.
        prompt_bytes: Most held-out bytes for the generated text to continue.
        new_bytes: Bytes to generate.
        max_digits: Of the longest number.
        word_steps: Training steps of the encoder-decoder, each of 128 numbers.
        held_out_numbers: How many numbers to be judged by.
        step_bytes: Length of the text in the training step that is timed.
        rounds: How often it is timed.
    """

    training_bytes: int
    held_out_bytes: int
    embed_dim: int
    num_layers: int
    batch: int
    window: int
    steps: int
    prompt_bytes: int
    new_bytes: int
    max_digits: int
    word_steps: int
    held_out_numbers: int
    step_bytes: int
    rounds: int


FULL = Sizes(
    training_bytes=3 << 20,
    held_out_bytes=32 << 10,
    embed_dim=128,
    num_layers=4,
    batch=8,
    window=128,
    steps=600,
    prompt_bytes=200,
    new_bytes=256,
    max_digits=9,
    word_steps=220,
    held_out_numbers=500,
    step_bytes=2048,
    rounds=3,
)
QUICK = Sizes(
    training_bytes=256 << 10,
    held_out_bytes=8 << 10,
    embed_dim=64,
    num_layers=2,
    batch=8,
    window=64,
    steps=120,
    prompt_bytes=64,
    new_bytes=64,
    max_digits=4,
    word_steps=90,
    held_out_numbers=100,
    step_bytes=1024,
    rounds=1,
)
