"""`zeta convert`: its options, what it says and writes, and what it refuses."""

import argparse
import io
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.convert.commands import Captured, Evil, refuse, run
from tests.convert.sources import make
from zeta.cli import convert as command
from zeta.convert import checkpoints


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


@pytest.mark.parametrize("place", ["state_dict", "model", "model_state_dict"])
def test_a_tensor_beside_the_state_dict_is_left_there(
    place: str, state: dict[str, Tensor], tmp_path: Path, capsys: Captured
) -> None:
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save({place: state, "rng_state": torch.get_rng_state(), "best": torch.ones(())}, path)
    assert run(path, "--from", "torch", "--output", out) == 0
    assert "  kept         rng_state, best: as they were" in capsys.readouterr().out
    assert "layers.0.self_attn.q_proj.weight" in torch.load(out)[place]


def test_names_that_no_file_can_have_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: Captured
) -> None:
    long = tmp_path / f"{'a' * 300}.pt"
    refuse(capsys, f"cannot read {long}: File name too long", long, "--from", "torch")
    refuse(capsys, f"cannot write {long}: File name too long", checkpoint, "--from", "torch",
           "--output", long)  # fmt: skip


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
        (["{file}", "--from", "torch", "--to", "llama", "--check", "--num-heads", "4"],
         "differ in what no tensor tells: the rotation of queries and keys"),
    ],
)  # fmt: skip
def test_wrong_input(
    arguments: list[str], words: str, checkpoint: Path, tmp_path: Path, capsys: Captured
) -> None:
    names = {"file": checkpoint, "folder": tmp_path, "missing": tmp_path / "none"}
    refuse(capsys, words, *[argument.format(**names) for argument in arguments])
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: Captured) -> None:
    pipe = tmp_path / "pipe.pt"
    os.mkfifo(pipe)
    refuse(capsys, f"cannot read {pipe}: it is no file", pipe, "--from", "torch")


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
        [sys.executable, "-m", "zeta", "convert", str(path), "--from", "torch"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"zeta convert: {path} holds ")
    assert list(tmp_path.iterdir()) == [path]
