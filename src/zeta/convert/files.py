"""Checkpoint files: safetensors, and torch's without code in them. Read whole, written whole."""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeta.convert.errors import ConversionError

SAFETENSORS = (".safetensors",)
TORCH = (".pt", ".pth", ".bin", ".ckpt")
INSTALL = "pip install 'zeta-attention[convert]'"

Progress = Callable[[int, int], None]
"""Called with how many tensors are done, and of how many."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state: The state dict.
        around: What a torch file holds beside it, and under which of its keys the state dict is;
            empty where the file is the state dict.
        place: That key.
        metadata: Of a safetensors file.
    """

    state: dict[str, Any]
    around: dict[str, Any] = field(default_factory=dict)
    place: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def replaced(self, state: dict[str, Any]) -> "Checkpoint":
        """The same with another state dict."""
        return Checkpoint(state, self.around, self.place, self.metadata)

    @property
    def nbytes(self) -> int:
        """Of the dense tensors in the state dict."""
        return sum(value.nbytes for value in self.state.values() if _is_dense(value))


def read(path: Path, progress: Progress = lambda done, total: None) -> Checkpoint:
    """Read a checkpoint, by the file's suffix.

    A torch file is read with ``weights_only=True``: what it holds beside tensors and plain values
    is refused, never run.

    Args:
        path: Ends in ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt``.
        progress: Told of each tensor, as far as the format allows.

    Raises:
        OSError: The file cannot be read.
        ConversionError: It is not what its name says, is damaged, or holds something else.
    """
    check_suffix(path)
    with path.open("rb") as file:
        if not file.read(1):
            raise ConversionError(f"{path} is empty")
    if path.suffix in SAFETENSORS:
        return _read_safetensors(path, progress)
    return _read_torch(path)


def write(path: Path, checkpoint: Checkpoint, *, force: bool = False) -> None:
    """Write a checkpoint, by the file's suffix: all of it, or nothing.

    Args:
        path: As for `read`.
        checkpoint: A safetensors file takes its state dict alone.
        force: Whether a file that is there may be replaced.

    Raises:
        FileExistsError: It is there.
        OSError: It cannot be written.
        ConversionError: It would hold what the format cannot.
    """
    check_suffix(path)
    path = path.resolve()
    if path.exists() and not force:
        raise FileExistsError(17, "File exists", str(path))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        # Made here first, so that a folder that cannot be written to is found out as such.
        with unfinished.open("xb") as file:
            if path.suffix not in SAFETENSORS:
                whole = dict(checkpoint.around)
                if checkpoint.place is not None:
                    whole[checkpoint.place] = checkpoint.state
                torch.save(checkpoint.state if checkpoint.place is None else whole, file)
        if path.suffix in SAFETENSORS:
            _write_safetensors(unfinished, checkpoint)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_suffix(path: Path) -> None:
    """Raise ConversionError unless a file's name says what it is.

    Raises:
        ConversionError: It does not, or it is a safetensors file and that package is missing.
    """
    if path.suffix not in SAFETENSORS + TORCH:
        known = ", ".join(SAFETENSORS + TORCH)
        raise ConversionError(f"{path} must end in one of {known}")
    if path.suffix in SAFETENSORS:
        _safetensors()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ConversionError(f"safetensors files need safetensors: {INSTALL}") from error
    return safetensors


def _read_safetensors(path: Path, progress: Progress) -> Checkpoint:
    library = _safetensors()
    try:
        with library.safe_open(path, "pt") as file:
            names = list(file.keys())
            state = {}
            for done, name in enumerate(names, start=1):
                state[name] = file.get_tensor(name)
                progress(done, len(names))
            return Checkpoint(state, metadata=dict(file.metadata() or {}))
    except library.SafetensorError as error:
        raise ConversionError(f"{path} is not a whole safetensors file: {_line(error)}") from error


def _write_safetensors(path: Path, checkpoint: Checkpoint) -> None:
    library = _safetensors()
    others = [key for key, value in checkpoint.state.items() if not isinstance(value, Tensor)]
    if others:
        raise ConversionError(f"safetensors files hold tensors only; {others[0]} is none")
    for key, tensor in checkpoint.state.items():
        if not _is_dense(tensor) or tensor.is_meta:
            kind = "on the meta device" if tensor.is_meta else tensor.layout
            raise ConversionError(
                f"safetensors files hold dense tensors with numbers only; {key} is {kind}"
            )
    metadata = checkpoint.metadata or {"format": "pt"}
    seen: set[int] = set()
    tensors = {}
    for key, tensor in checkpoint.state.items():
        # The format has no tensors that share memory: each is written out.
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.clone() if storage in seen else tensor
        tensors[key] = tensor.contiguous()
        seen.add(storage)
    try:
        library.torch.save_file(tensors, path, metadata)
    except library.SafetensorError as error:
        if "I/O error" in str(error) or "Io" in str(error):
            raise OSError(5, _line(error), str(path)) from error
        raise ConversionError(f"cannot be a safetensors file: {_line(error)}") from error


def _read_torch(path: Path) -> Checkpoint:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Of a damaged file, torch raises whatever comes up.
        raise ConversionError(f"{path} {_complaint(error)}") from error
    if not isinstance(loaded, Mapping):
        raise ConversionError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    places = [
        key for key, value in loaded.items() if isinstance(value, Mapping) and _is_state(value)
    ]
    named = [key for key in ("state_dict", "model", "model_state_dict") if key in places]
    # Other tensors may lie beside a state dict.
    if not named and _is_state(loaded):
        return Checkpoint(dict(loaded))
    if len(named or places) != 1:
        listed = ", ".join(map(repr, places)) or "none"
        raise ConversionError(f"{path} must hold one state dict; it has {listed}")
    place = (named or places)[0]
    return Checkpoint(dict(loaded[place]), dict(loaded), place)


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _is_state(value: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) for key in value) and any(
        isinstance(part, Tensor) for part in value.values()
    )


def _complaint(error: Exception) -> str:
    """What is wrong with a file that torch does not load; torch's advice is to run its code."""
    text = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", text)
    if code:
        return f"holds {code[1]}, which is code and was not run; save the state dict alone"
    if "TorchScript" in text:
        return "is a TorchScript archive, which is code and was not run; save the state dict alone"
    if "zip archive" in text:
        return f"is not a whole torch file: {text.partition('. ')[0]}"
    return "is not a torch file of tensors and plain values"


def _line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
