"""`zeta convert`: files that are what they say, and files that are not."""

import argparse
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.convert.sources import make
from zeta.cli import convert as command
from zeta.cli import main
from zeta.convert import ConversionError, checkpoints, files
from zeta.convert.files import Checkpoint, read, write

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Two layers with attention."""
    layer = nn.TransformerEncoderLayer(16, 4, 24)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).state_dict()


@pytest.fixture
def checkpoint(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(state, path, {"format": "pt", "step": "7"})
    return path


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def refuse(capsys: Captured, words: str, *arguments: object) -> None:
    """Checks for exit code 2 and one line of error with these words."""
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("zeta convert: ")
    assert error.count("\n") == 1
    assert words in error


def test_options(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    found = set(
        re.findall(r"^  .*?(--[a-z-]+)", text.partition("examples:")[0], flags=re.MULTILINE)
    )
    assert found == {"--help", "--from", "--to", "--check", "--num-heads", "--output", "--force"}
    for example in re.findall(r"^  zeta convert (.*)$", text, flags=re.MULTILINE):
        parser = argparse.ArgumentParser()
        command.add_to(parser.add_subparsers())
        parser.parse_args(["convert", *example.split()])


def test_there_and_back(
    checkpoint: Path, state: dict[str, Tensor], tmp_path: Path, capsys: Captured
) -> None:
    before = checkpoint.read_bytes()
    ours, theirs = tmp_path / "zeta.safetensors", tmp_path / "back.safetensors"
    assert run(checkpoint, "--from", "torch", "--check", "--num-heads", 4, "--output", ours) == 0
    printed = capsys.readouterr().out
    assert f"{checkpoint}: torch to zeta" in printed
    assert "  layers.1.self_attn: 4 tensors to 8\n  16 other keys: as they were\n" in printed
    assert printed.count("zeta.nn.MultiheadAttention: equal\n") == 1
    assert "  layers.1.self_attn: equal, largest error " in printed
    assert printed.endswith(f"  written      {ours}\n")
    found = load_file(ours)
    assert torch.equal(
        found["layers.0.self_attn.k_proj.weight"], state["layers.0.self_attn.in_proj_weight"][16:32]
    )
    assert torch.equal(found["layers.1.linear1.weight"], state["layers.1.linear1.weight"])
    assert run(ours, "--from", "zeta", "--to", "torch", "--output", theirs) == 0
    back = load_file(theirs)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor)
    with safe_open(theirs, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}
    assert checkpoint.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back.safetensors", "model.safetensors", "zeta.safetensors",
    ]  # fmt: skip


def test_a_learned_key_there_and_back(tmp_path: Path, capsys: Captured) -> None:
    module = nn.MultiheadAttention(16, 4, add_bias_kv=True)
    path, ours, theirs = (tmp_path / name for name in ("a.pt", "zeta.safetensors", "b.pt"))
    torch.save({f"a.{key}": tensor for key, tensor in module.state_dict().items()}, path)
    assert run(path, "--from", "torch", "--check", "--num-heads", 4, "--output", ours) == 0
    assert "  a:           6 tensors to 10\n" in capsys.readouterr().out
    assert load_file(ours)["a.bias_v"].shape == (1, 1, 16)
    options = ("--to", "torch", "--check", "--num-heads", 4, "--output", theirs)
    assert run(ours, "--from", "zeta", *options) == 0
    back = torch.load(theirs)
    for key, tensor in module.state_dict().items():
        assert torch.equal(back[f"a.{key}"], tensor)


def test_nothing_is_written_without_an_output(checkpoint: Path, capsys: Captured) -> None:
    assert run(checkpoint, "--from", "torch") == 0
    assert "\n  written" not in capsys.readouterr().out
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_between_two_other_kinds_both_are_proven(
    checkpoint: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out.pt"
    options = ("--from", "torch", "--to", "gpt2", "--check", "--num-heads", 4, "--output", out)
    assert run(checkpoint, *options) == 0
    printed = capsys.readouterr().out
    assert "torch.nn.MultiheadAttention and zeta" in printed
    assert "transformers GPT2Attention and zeta" in printed
    assert torch.load(out)["layers.0.self_attn.c_attn.weight"].shape == (16, 48)


def test_the_heads_of_t5_are_in_its_table(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "t5.safetensors"
    module = make("t5, encoder bias")
    save_file({f"block.0.{key}": tensor for key, tensor in module.state_dict().items()}, path)
    assert run(path, "--from", "t5", "--check") == 0
    printed = capsys.readouterr().out
    assert "T5Attention and zeta.nn.MultiheadAttention: equal" in printed
    assert "  1 other key: as it was\n" in printed


@pytest.mark.parametrize(
    ("names", "row"),
    [
        (["bias"], "  1 key dropped: no parameter, h.attn.bias\n"),
        (["bias", "masked_bias"], "  2 keys dropped: no parameters, as h.attn.bias\n"),
    ],
)
def test_keys_that_are_dropped_are_counted(
    names: list[str], row: str, tmp_path: Path, capsys: Captured
) -> None:
    path = tmp_path / "gpt2.safetensors"
    state = {**make("gpt2").state_dict(), **{name: torch.ones(2) for name in names}}
    save_file({f"h.attn.{key}": tensor for key, tensor in state.items()}, path)
    assert run(path, "--from", "gpt2") == 0
    printed = capsys.readouterr().out
    assert row in printed
    assert "  0 other keys: as they were\n" in printed


def test_a_difference_writes_nothing(
    checkpoint: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = checkpoints.fill

    def wrong(attention: Any, tensors: dict[str, Tensor]) -> None:
        right(attention, {**tensors, "q_proj.weight": tensors["q_proj.weight"] * 1.001})

    monkeypatch.setattr(checkpoints, "fill", wrong)
    out = tmp_path / "out.pt"
    code = run(checkpoint, "--from", "torch", "--check", "--num-heads", 4, "--output", out)
    assert code == 1
    printed = capsys.readouterr().out
    assert printed.count("MultiheadAttention: DIFFERENT") == 2
    assert printed.endswith("\nDifferent: nothing was written\n")
    assert not out.exists()


def test_torch_files_keep_what_is_around_the_state_dict(
    state: dict[str, Tensor], tmp_path: Path, capsys: Captured
) -> None:
    path, out, alone = (tmp_path / name for name in ("in.pt", "out.pt", "out.safetensors"))
    torch.save({"model": state, "epoch": 3, "optimizer": {"state": {}}}, path)
    assert run(path, "--from", "torch", "--output", out) == 0
    assert "  kept         epoch, optimizer: as they were" in capsys.readouterr().out
    loaded = torch.load(out)
    assert loaded["epoch"] == 3
    assert "layers.0.self_attn.q_proj.weight" in loaded["model"]
    assert run(path, "--from", "torch", "--output", alone) == 0
    assert "  left out     epoch, optimizer: " in capsys.readouterr().out
    assert load_file(alone).keys() == loaded["model"].keys()


def test_an_output_is_replaced_only_by_force(
    checkpoint: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out.pt"
    out.write_text("precious")
    refuse(capsys, f"{out} exists; --force replaces it", checkpoint, "--from", "torch",
           "--output", out)  # fmt: skip
    assert out.read_text() == "precious"
    assert run(checkpoint, "--from", "torch", "--output", out, "--force") == 0
    assert "layers.0.self_attn.q_proj.weight" in torch.load(out)
    # The input itself, too.
    assert run(checkpoint, "--from", "torch", "--output", checkpoint, "--force") == 0
    assert "layers.0.self_attn.q_proj.weight" in load_file(checkpoint)


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch pwned",))


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{missing}.pt", "--from", "torch"], "cannot read"),
        (["{folder}", "--from", "torch"], "must end in one of .safetensors, .pt"),
        (["{file}", "--from", "t5"], "there is no attention of kind t5"),
        (["{file}", "--from", "torch", "--to", "torch"], "--from and --to are both torch"),
        (["{file}", "--from", "torch", "--check"], "--check needs --num-heads: the shapes of "),
        (["{file}", "--from", "torch", "--check", "--num-heads", "3"], "cannot be shared by 3"),
        (["{file}", "--from", "torch", "--output", "{folder}/out.txt"], "must end in one of"),
        (["{file}", "--from", "torch", "--output", "{missing}/out.pt"], "is not a folder"),
        (["{file}", "--from", "torch", "--to", "llama", "--check", "--num-heads", "16"],
         "head_dim must be even"),
    ],
)  # fmt: skip
def test_wrong_input(
    arguments: list[str], words: str, checkpoint: Path, tmp_path: Path, capsys: Captured
) -> None:
    names = {"file": checkpoint, "folder": tmp_path, "missing": tmp_path / "none"}
    refuse(capsys, words, *[argument.format(**names) for argument in arguments])
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.pt"], "the following arguments are required: --from"),
        (["x.pt", "--from", "jax"], "argument --from: invalid choice: 'jax'"),
        (["x.pt", "--from", "torch", "--num-heads", "0"], "must be a positive integer; got '0'"),
    ],
)
def test_wrong_options(arguments: list[str], words: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


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


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_of_big_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BIG", 1)
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    assert run(checkpoint, "--from", "torch", "--output", tmp_path / "out.pt") == 0
    assert isinstance(sys.stderr, FakeTerminal)
    shown = sys.stderr.getvalue()
    assert "reading model.safetensors (0.0 GiB)  24/24" in shown
    assert "writing out.pt (0.0 GiB)  0/32" in shown
    assert shown.endswith("\r\033[K")


def test_no_progress_where_there_is_no_terminal(
    checkpoint: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BIG", 1)
    assert run(checkpoint, "--from", "torch") == 0
    assert capsys.readouterr().err == ""


def test_in_a_process(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    ended = subprocess.run(
        [sys.executable, "-m", "zeta.cli", "convert", str(path), "--from", "torch"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"zeta convert: {path} holds ")
    assert list(tmp_path.iterdir()) == [path]
