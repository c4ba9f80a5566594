"""Checkpoint files: read if they are what they say, written whole or not at all."""

import argparse
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.convert.commands import Captured, Evil, refuse, run
from zeta.convert import ConversionError, files
from zeta.convert.files import Checkpoint, read, write


def text(path: Path, whole: bytes) -> None:
    path.write_text("This is no checkpoint, whatever its name.\n" * 50)


def truncated(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[: len(whole) * 2 // 3])


def empty(path: Path, whole: bytes) -> None:
    path.touch()


def code(path: Path, whole: bytes) -> None:
    torch.save({"model": Evil(), "a.in_proj_weight": torch.ones(3, 1)}, path)


def plain_pickle(path: Path, whole: bytes) -> None:
    path.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))


def newer_pickle(path: Path, whole: bytes) -> None:
    path.write_bytes(pickle.dumps({"a": Evil()}, protocol=4))


def cut_short(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[:2000])


def scripted(path: Path, whole: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # An old sort of file.
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)


def configuration(path: Path, whole: bytes) -> None:
    torch.save({"args": argparse.Namespace(x=1), "model": {"w": torch.ones(1)}}, path)


def whole_module(path: Path, whole: bytes) -> None:
    torch.save(nn.MultiheadAttention(8, 2), path)


def a_list(path: Path, whole: bytes) -> None:
    torch.save([torch.ones(2)], path)


def no_tensors(path: Path, whole: bytes) -> None:
    torch.save({"epoch": 3}, path)


def two_states(path: Path, whole: bytes) -> None:
    torch.save({"generator": {"w": torch.ones(1)}, "critic": {"w": torch.ones(1)}}, path)


def other_format(path: Path, whole: bytes) -> None:
    if path.suffix == ".pt":
        save_file({"w": torch.ones(1)}, path)
    else:
        torch.save({"w": torch.ones(1)}, path)


def noise(path: Path, whole: bytes) -> None:
    path.write_bytes(bytes(range(7, 207)) * 20)


NOT_TORCH = "is not a torch file of tensors and plain values"
NOT_WHOLE = "is not a whole torch file: "
NOT_SAFE = "is not a whole safetensors file: "


@pytest.mark.parametrize(
    ("spoil", "suffix", "words"),
    [
        (text, ".pt", NOT_TORCH),
        (text, ".safetensors", NOT_SAFE),
        (truncated, ".pt", NOT_TORCH),
        (cut_short, ".pt", NOT_WHOLE),
        (scripted, ".pt", "is a TorchScript archive, which is code and was not run"),
        (truncated, ".safetensors", NOT_SAFE),
        (empty, ".pt", "is empty"),
        (empty, ".safetensors", "is empty"),
        (code, ".pt", "system, which is code and was not run; save the state dict alone"),
        (code, ".bin", "system, which is code and was not run; save the state dict alone"),
        (code, ".safetensors", NOT_SAFE),
        (plain_pickle, ".pth", ".system, which is code and was not run"),
        (newer_pickle, ".pth", NOT_TORCH),
        (configuration, ".pt", "argparse.Namespace, which is code and was not run"),
        (whole_module, ".pt", "MultiheadAttention, which is code and was not run"),
        (a_list, ".pt", "holds a list, not a state dict"),
        (no_tensors, ".pt", "must hold one state dict; it has none"),
        (two_states, ".pt", "must hold one state dict; it has 'generator', 'critic'"),
        (other_format, ".pt", NOT_TORCH),
        (other_format, ".safetensors", NOT_SAFE),
        (noise, ".ckpt", NOT_TORCH),
        (noise, ".safetensors", NOT_SAFE),
    ],
)
def test_a_file_that_is_not_what_it_says(
    spoil: Callable[[Path, bytes], None],
    suffix: str,
    words: str,
    state: dict[str, Tensor],
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    good = tmp_path / f"good{suffix}"
    write(good, Checkpoint(dict(state)))
    bad, out = tmp_path / f"bad{suffix}", tmp_path / "out.safetensors"
    spoil(bad, good.read_bytes())
    before = bad.read_bytes()
    refuse(capsys, words, bad, "--from", "torch", "--output", out)
    assert bad.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {good.name, bad.name}


def test_without_safetensors(
    checkpoint: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    words = "safetensors files need safetensors: pip install 'zeta-attention[convert]'"
    refuse(capsys, words, checkpoint, "--from", "torch")
    torch_file = tmp_path / "in.pt"
    torch.save(
        {"in_proj_weight": torch.ones(3, 1), "out_proj.weight": torch.ones(1, 1)}, torch_file
    )
    refuse(capsys, words, torch_file, "--from", "torch", "--output", tmp_path / "o.safetensors")
    assert run(torch_file, "--from", "torch") == 0


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_leaves_no_file(
    suffix: str, checkpoint: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.torch, "save", fail)
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    out = tmp_path / f"out{suffix}"
    refuse(capsys, f"cannot write {out}: No space left on device", checkpoint, "--from", "torch",
           "--output", out)  # fmt: skip
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_an_interruption_leaves_no_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.torch, "save", interrupt)
    assert run(checkpoint, "--from", "torch", "--output", tmp_path / "out.pt") == 130
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_safetensors_files_hold_tensors_only(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="safetensors files hold tensors only; step is none"):
        write(tmp_path / "x.safetensors", Checkpoint({"step": 3}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (torch.ones(3, device="meta"), "on the meta device"),
    ],
)
def test_safetensors_files_hold_numbers_only(tensor: Tensor, kind: str, tmp_path: Path) -> None:
    words = f"safetensors files hold dense tensors with numbers only; odd is {kind}"
    with pytest.raises(ConversionError, match=words):
        write(tmp_path / "x.safetensors", Checkpoint({"odd": tensor}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")  # torch 2.14
def test_a_sparse_tensor_beside_attentions_is_kept(
    state: dict[str, Tensor], tmp_path: Path, capsys: Captured
) -> None:
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(state | {"odd": torch.eye(3).to_sparse()}, path)
    assert run(path, "--from", "torch", "--output", out) == 0
    assert torch.equal(torch.load(out)["odd"].to_dense(), torch.eye(3))
    words = "safetensors files hold dense tensors with numbers only; odd is torch.sparse_coo"
    refuse(capsys, words, path, "--from", "torch", "--output", tmp_path / "out.safetensors")


def test_tied_tensors_are_written_out(tmp_path: Path) -> None:
    table = torch.randn(4, 4)
    path = tmp_path / "x.safetensors"
    write(path, Checkpoint({"a": table, "b": table, "c": table[:2], "d": table.T}))
    found = read(path).state
    assert torch.equal(found["b"], table)
    assert torch.equal(found["c"], table[:2])
    assert torch.equal(found["d"], table.T)


def test_writing_asks_before_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        write(path, Checkpoint({"a": torch.ones(1)}))
    assert path.read_text() == "precious"
