"""The text and what simple predictors make of it."""

import math
from collections import Counter
from pathlib import Path

import pytest

from zeta.examples import byte_text
from zeta.examples.byte_text import ByteText, from_file, lzma_bits, standard_library, unigram_bits


def test_standard_library_is_split_in_whole_files() -> None:
    text = standard_library(1 << 20, 32 << 10)
    assert len(text.training) == 1 << 20
    assert 16 << 10 < len(text.held_out) <= 32 << 10
    lines = [line for line in text.held_out.splitlines() if len(line) > 60]
    shared = sum(line in text.training for line in lines)
    assert len(lines) > 50
    assert shared < len(lines) / 10
    assert standard_library(1 << 20, 32 << 10) == text


def test_python_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="too little of the standard library's source; give --tex"):
        standard_library(1 << 20, 32 << 10)


def test_file_is_split_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "text"
    content = bytes(range(256)) * 100
    path.write_bytes(content)
    text = from_file(path, 1 << 20, 32 << 10)
    assert text.training + text.held_out == content
    assert len(text.held_out) == len(content) // 10
    assert text.name == str(path)
    assert len(from_file(path, 20_000, 1000).held_out) == 1000


def test_unigram_is_the_cross_entropy_of_counts() -> None:
    text = ByteText("", b"aab", b"ab")
    expected = -(math.log2(3 / 259) + math.log2(2 / 259)) / 2
    assert unigram_bits(text) == pytest.approx(expected)


def test_unigram_of_a_long_text_is_its_entropy() -> None:
    content = b"the quick brown fox " * 5000
    shares = [count / len(content) for count in Counter(content).values()]
    entropy = -sum(share * math.log2(share) for share in shares)
    assert unigram_bits(ByteText("", content, content)) == pytest.approx(entropy, rel=1e-3)


def test_lzma_that_knows_the_text_needs_next_to_nothing() -> None:
    content = standard_library(64 << 10, 32 << 10).held_out
    text = ByteText("", content, content)
    assert 1.5 < lzma_bits(text, primed=False) < 4.0
    assert lzma_bits(text, primed=True) < 0.05
