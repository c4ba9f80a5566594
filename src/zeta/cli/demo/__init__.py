"""``zeta demo``: train, generate, translate and time, in a few minutes."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import zeta
from zeta.cli.demo import generation, language, step, words
from zeta.cli.demo.sizes import FULL, QUICK, Sizes
from zeta.cli.terminal import INSTALL, InputError, is_installed, row
from zeta.examples.byte_text import ByteText, from_file, standard_library

DESCRIPTION = """\
Train two small models built from zeta.nn, and see what they do:
  1. a language model of bytes, on the standard library's source or on a text of yours;
  2. its generation, byte by byte, with the cache and without;
  3. an encoder-decoder that writes numbers as English words, and a picture of its cross-attention;
  4. a training step's time and memory, beside attention as textbooks write it.
It takes a few minutes on two CPU cores, and runs on the CPU alone."""
EXAMPLES = """\
examples:
  zeta demo
  zeta demo --quick
  zeta demo --text war-and-peace.txt --output pictures --seed 7"""


def add_to(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="train, generate, translate and time, in a few minutes",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="what to learn from")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("demo-output"),
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=_seed, metavar="N", default=0, help="of all that is drawn (default: 0)"
    )
    parser.add_argument("--quick", action="store_true", help="all of it, smaller: a minute or less")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        0, or 1 where cached and full logits disagree.

    Raises:
        InputError: The text or the output folder cannot be used.
    """
    began = time.perf_counter()
    sizes = QUICK if arguments.quick else FULL
    text = _read(arguments.text, sizes)
    made = _prepare(arguments.output)
    try:
        print(
            f"Zeta {zeta.__version__}, torch {torch.__version__}, "
            f"threads: {torch.get_num_threads()}, seed: {arguments.seed}"
        )
        if not is_installed("tqdm"):
            row("note", f"no progress bar without tqdm: {INSTALL}")
        model = language.train(text, sizes, arguments.seed)
        agrees = generation.compare(model, text, sizes, arguments.seed)
        picture = words.train(sizes, arguments.seed, arguments.output)
        step.compare(model, text, sizes, arguments.seed)
        took = f"{time.perf_counter() - began:.0f} s"
        print(f"\nDone in {took}; the picture is {picture}" if picture else f"\nDone in {took}")
        return 0 if agrees else 1
    finally:
        for folder in made:
            _remove_if_empty(folder)


def _seed(text: str) -> int:
    if text.isdecimal() and int(text) < 2**63:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be an integer in [0, 2**63); got {text!r}")


def _read(path: Path | None, sizes: Sizes) -> ByteText:
    try:
        if path is None:
            return standard_library(sizes.training_bytes, sizes.held_out_bytes)
        return from_file(path, sizes.training_bytes, sizes.held_out_bytes)
    except ValueError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}") from error


def _prepare(folder: Path) -> list[Path]:
    """Make the output folder, and try that files can be made in it.

    Returns:
        The folders that were not there before, innermost first.
    """
    missing: list[Path] = []
    try:
        missing += [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        for path in missing:
            _remove_if_empty(path)
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    return missing


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
