"""``zeta convert``: the attentions in a checkpoint file to Zeta's or another library's keys."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zeta.cli.terminal import InputError, heading, row
from zeta.convert.checkpoints import KINDS, ZETA, Converted, Found, convert_state_dict, prove
from zeta.convert.errors import ConversionError
from zeta.convert.files import Checkpoint, check_suffix, read, write
from zeta.convert.report import Report
from zeta.convert.t5 import BIAS

DESCRIPTION = f"""\
Find every attention layer in a checkpoint and rename and reshape its tensors, from one
library's layout to another's. All other tensors are kept as they are.

A KIND is a library or a model family:
  {", ".join(KINDS[:6])},
  {", ".join(KINDS[6:])}

FILE is a safetensors file, or one of torch's (.pt, .pth, .bin, .ckpt); code in it is never
run. Without --output nothing is written: the command only says what it would convert."""
EXAMPLES = """\
examples:
  zeta convert model.safetensors --from torch
  zeta convert model.pt --from torch --check --num-heads 8 --output zeta.safetensors
  zeta convert t5.safetensors --from t5 --to zeta --check
  zeta convert zeta.safetensors --from zeta --to torch --output model.pt --force"""
BIG = 64 * 2**20
"""Bytes from which on a file's progress is shown."""


def add_to(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "convert",
        help="convert the attentions in a checkpoint file, with a proof",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the checkpoint to read")
    parser.add_argument(
        "--from", dest="source", choices=KINDS, required=True, metavar="KIND",
        help="the kind of attention that FILE holds",
    )  # fmt: skip
    parser.add_argument(
        "--to", dest="target", choices=KINDS, default=ZETA, metavar="KIND",
        help="the kind to convert to (default: zeta)",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true", help="run both attentions on random inputs and "
        "compare them; where they differ nothing is written, and the exit code is 1",
    )  # fmt: skip
    parser.add_argument(
        "--num-heads", type=_positive, metavar="N", help="number of heads; --check needs it where "
        "shapes do not tell it",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert a file.

    Returns:
        0, or 1 where a check found a difference.

    Raises:
        InputError: The file, the output or an option cannot be used.
    """
    source, target, output = arguments.source, arguments.target, arguments.output
    if source == target:
        raise InputError(f"--from and --to are both {source}")
    try:
        _check_output(output, arguments.force)
        checkpoint = _read(arguments.file)
        converted = convert_state_dict(checkpoint.state, source, target)
        _describe(converted, arguments.file, source, target)
        if arguments.check and not _check(converted, source, target, arguments.num_heads):
            print("\nDifferent: nothing was written", flush=True)
            return 1
        if output is not None:
            _write(output, checkpoint.replaced(converted.state), arguments.force)
    except ConversionError as error:
        raise InputError(" ".join(str(error).split())) from error
    return 0


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")


def _check_output(output: Path | None, force: bool) -> None:
    """Raise for an output that cannot be, before the work."""
    if output is None:
        return
    check_suffix(output)
    try:
        if output.is_dir():
            raise InputError(f"cannot write {output}: Is a directory")
        if output.exists() and not force:
            raise InputError(f"{output} exists; --force replaces it")
        if not output.parent.is_dir():
            raise InputError(f"cannot write {output}: {output.parent} is not a folder")
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error


def _read(path: Path) -> Checkpoint:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"cannot read {path}: it is no file, but a pipe or a device")
        size = path.stat().st_size
        with _progress(f"reading {path.name}", size) as progress:
            return read(path, progress)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _write(path: Path, checkpoint: Checkpoint, force: bool) -> None:
    alone = path.suffix == ".safetensors" and checkpoint.place is not None
    try:
        with _progress(f"writing {path.name}", checkpoint.nbytes) as progress:
            progress(0, len(checkpoint.state))
            write(path, checkpoint, force=force)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    others = [key for key in checkpoint.around if key != checkpoint.place]
    if others and alone:
        row("left out", f"{', '.join(map(str, others))}: a safetensors file holds tensors only")
    elif others:
        row("kept", f"{', '.join(map(str, others))}: as they were, whatever they say of parameters")
    row("written", str(path))


def _describe(converted: Converted, path: Path, source: str, target: str) -> None:
    heading(f"{path}: {source} to {target}")
    for found in converted.attentions:
        count = f"{len(found.before)} tensors to {len(found.after)}"
        row(f"{found.name}:", count)
    kept = len(converted.state) - sum(len(found.after) for found in converted.attentions)
    if kept == 1:
        row("1 other key:", "as it was")
    else:
        row(f"{kept} other keys:", "as they were")
    if len(converted.dropped) == 1:
        row("1 key dropped:", f"no parameter, {converted.dropped[0]}")
    elif converted.dropped:
        row(f"{len(converted.dropped)} keys dropped:", f"no parameters, as {converted.dropped[0]}")
    for prefix in converted.others:
        row(f"{prefix.removesuffix('.')}:", f"not of kind {source}, as it was")


def _check(converted: Converted, source: str, target: str, num_heads: int | None) -> bool:
    """Prove each attention; print the report of the first of each shape, and of any that fails."""
    num_heads = num_heads or _heads_of_t5(converted)
    kinds = [kind for kind in (source, target) if kind != ZETA]
    seen: set[tuple[Any, ...]] = set()
    passed = True
    for found in converted.attentions:
        for kind in kinds:
            report = _prove(found, kind, source, num_heads)
            shape = (kind, *sorted((key, tensor.shape) for key, tensor in found.zeta.items()))
            if shape not in seen or not report.passed:
                heading(f"Check of {found.name}")
                print(report, flush=True)
            else:
                worst = max(e for case in report.cases for e in case.errors if e is not None)
                row(f"{found.name}:", f"equal, largest error {worst:.1e}")
            seen.add(shape)
            passed &= report.passed
    return passed


def _prove(found: Found, kind: str, source: str, num_heads: int | None) -> Report:
    theirs = found.before if kind == source else found.after
    try:
        return prove(found.zeta, theirs, kind, num_heads, found.name)
    except ConversionError as error:
        if num_heads is None and "number of heads" in str(error):
            raise InputError(f"--check needs --num-heads: {error}") from error
        raise


def _heads_of_t5(converted: Converted) -> int | None:
    """Columns of a table of position biases, one a head."""
    for key, value in converted.state.items():
        if key.endswith(BIAS) and value.dim() == 2:
            return int(value.shape[1])
    return None


@contextmanager
def _progress(label: str, size: int) -> Iterator[Any]:
    """Show on a terminal's standard error how far a big file is; yields what is told of it."""
    shown = size >= BIG and sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if shown:
            text = f"\r  {label} ({size / 2**30:.1f} GiB)  {done}/{total}"
            print(text, end="", file=sys.stderr, flush=True)

    try:
        if shown:
            print(f"\r  {label} ({size / 2**30:.1f} GiB)", end="", file=sys.stderr, flush=True)
        yield show
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
