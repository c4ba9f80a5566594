"""Text to learn from, as bytes, and how well simpler things than a transformer predict it."""

import dataclasses
import lzma
import math
import random
import sysconfig
from collections import Counter
from pathlib import Path

SHORTEST = 16 * 1024


@dataclasses.dataclass(frozen=True)
class ByteText:
    """A text in two parts.

    Attributes:
        name: What it is, for people.
        training: The part to learn from.
        held_out: The part to be judged by.
    """

    name: str
    training: bytes
    held_out: bytes


def standard_library(training_bytes: int, held_out_bytes: int) -> ByteText:
    """The source files of the Python standard library's own modules, comments and all.

    Whole files of at most 8 KiB are held out; the split is the same each time.

    Args:
        training_bytes: The most to learn from.
        held_out_bytes: The most to hold out.

    Raises:
        ValueError: This Python comes without its source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    random.Random(0).shuffle(files)
    training, held_out = bytearray(), bytearray()
    for file in files:
        content = file.read_bytes()
        if len(content) <= 8 * 1024 and len(held_out) + len(content) <= held_out_bytes:
            held_out += content
        else:
            training += content
    if len(training) + len(held_out) < SHORTEST or not held_out:
        raise ValueError(f"{folder} has too little of the standard library's source; give --text")
    return ByteText(
        "the standard library's source", bytes(training[:training_bytes]), bytes(held_out)
    )


def from_file(path: Path, training_bytes: int, held_out_bytes: int) -> ByteText:
    """The beginning of a file; its last tenth, or less, is held out.

    Args:
        path: Any file; it need not be text.
        training_bytes: The most to learn from.
        held_out_bytes: The most to hold out.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too short.
    """
    with path.open("rb") as file:
        content = file.read(training_bytes + held_out_bytes)
    if not content:
        raise ValueError(f"{path} is empty")
    if len(content) < SHORTEST:
        raise ValueError(f"{path} has {len(content):,} bytes; at least {SHORTEST:,} are needed")
    split = len(content) - min(held_out_bytes, len(content) // 10)
    return ByteText(str(path), content[:split], content[split:])


def unigram_bits(text: ByteText) -> float:
    """Bits per held-out byte, predicted by the training part's frequencies plus one."""
    counts = Counter(text.training)
    total = len(text.training) + 256
    bits = [-math.log2((counts[byte] + 1) / total) for byte in range(256)]
    return sum(bits[byte] for byte in text.held_out) / len(text.held_out)


def lzma_bits(text: ByteText, *, primed: bool) -> float:
    """Bits per held-out byte of a raw LZMA2 stream, preset 9 extreme, without headers.

    Args:
        text: What is compressed.
        primed: Count what the held-out part adds behind the training part; else what it takes
            alone.
    """
    before = text.training if primed else b""
    added = _compressed_bytes(before + text.held_out) - _compressed_bytes(before)
    return 8 * added / len(text.held_out)


def _compressed_bytes(content: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return len(lzma.compress(content, format=lzma.FORMAT_RAW, filters=filters))
