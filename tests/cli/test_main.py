"""The command line: options, wrong input, exit codes; nothing is trained here."""

import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zeta
from zeta.cli import demo, main, terminal
from zeta.cli.demo import generation, words
from zeta.cli.demo.sizes import QUICK
from zeta.examples import numbers_to_words as task
from zeta.examples.byte_text import ByteText
from zeta.examples.encoder_decoder import EncoderDecoder
from zeta.examples.language_model import LanguageModel

Captured = pytest.CaptureFixture[str]


def options(command: str, capsys: Captured) -> set[str]:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return set(re.findall(r"^  .*?(--[a-z]+)", capsys.readouterr().out, flags=re.MULTILINE))


def test_demo_has_these_options_alone(capsys: Captured) -> None:
    assert options("demo", capsys) == {"--help", "--text", "--output", "--seed", "--quick"}


def test_doctor_has_no_options(capsys: Captured) -> None:
    assert options("doctor", capsys) == {"--help"}


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"zeta {zeta.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: command"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--seed", "x"], "argument --seed: must be an integer in [0, 2**63); got 'x'"),
        (["demo", "--seed", "-1"], "argument --seed: must be an integer in [0, 2**63); got '-1'"),
        (["demo", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], words: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def refuse(arguments: list[str], message: str, capsys: Captured) -> None:
    """Checks that the demo is refused, with one line, before it prints anything."""
    assert main(["demo", "--quick", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"zeta demo: {message}\n"


def test_missing_text(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "none.txt"
    message = f"cannot read {path}: No such file or directory"
    refuse(["--text", str(path), "--output", str(tmp_path / "out")], message, capsys)
    assert not (tmp_path / "out").exists()


def test_folder_for_text(tmp_path: Path, capsys: Captured) -> None:
    message = f"cannot read {tmp_path}: Is a directory"
    refuse(["--text", str(tmp_path), "--output", str(tmp_path / "out")], message, capsys)
    assert not (tmp_path / "out").exists()


def test_empty_text(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "empty.txt"
    path.touch()
    message = f"{path} is empty"
    refuse(["--text", str(path), "--output", str(tmp_path / "out")], message, capsys)
    assert not (tmp_path / "out").exists()


def test_short_text(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 16383)
    message = f"{path} has 16,383 bytes; at least 16,384 are needed"
    refuse(["--text", str(path), "--output", str(tmp_path / "out")], message, capsys)
    assert not (tmp_path / "out").exists()


def test_output_is_a_file(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    refuse(["--output", str(path)], f"cannot write to {path}: File exists", capsys)
    assert path.read_text() == "kept"


def test_output_below_a_file(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "file"
    path.touch()
    message = f"cannot write to {path / 'deep' / 'out'}: Not a directory"
    refuse(["--output", str(path / "deep" / "out")], message, capsys)


def test_output_not_writable(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_to_write(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    # Permissions do not stop a test that runs as root.
    monkeypatch.setattr(demo.tempfile, "TemporaryFile", refuse_to_write)
    path = tmp_path / "new" / "out"
    refuse(["--output", str(path)], f"cannot write to {path}: Permission denied", capsys)
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_in_a_process(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    ended = subprocess.run(
        [sys.executable, "-m", "zeta", "demo", "--text", str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == f"zeta demo: cannot read {path}: No such file or directory\n"
    assert list(tmp_path.iterdir()) == []


TEXT = ByteText("a test", b"abc " * 1000, b"a line\nand another\n" * 50)


def small_model() -> LanguageModel:
    return LanguageModel(embed_dim=32, num_layers=1).eval()


def test_disagreeing_logits_are_reported(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    full = LanguageModel.forward

    def wrong(self: LanguageModel, bytes_BT, caches=None, rel_pos=None):  # type: ignore[no-untyped-def]
        return full(self, bytes_BT, caches, rel_pos) + (0.0 if caches is None else 0.01)

    assert generation.compare(small_model(), TEXT, QUICK, seed=0)
    monkeypatch.setattr(LanguageModel, "forward", wrong)
    assert not generation.compare(small_model(), TEXT, QUICK, seed=0)
    assert "1.0e-02  largest difference" in capsys.readouterr().out


def test_disagreement_ends_in_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "language", SimpleNamespace(train=lambda *_: small_model()))
    monkeypatch.setattr(demo, "words", SimpleNamespace(train=lambda *_: None))
    monkeypatch.setattr(demo, "step", SimpleNamespace(compare=lambda *_: None))
    for agrees in (True, False):
        verdict = SimpleNamespace(compare=lambda *_, agrees=agrees: agrees)
        monkeypatch.setattr(demo, "generation", verdict)
        code = main(["demo", "--quick", "--output", str(tmp_path / "out")])
        assert code == (0 if agrees else 1)
    assert not (tmp_path / "out").exists()


def test_generated_bytes_cannot_command_the_terminal() -> None:
    assert generation._readable(b"a\tb\x1b[31m\xff\n\x07") == "a   b\ufffd[31m\ufffd\n\ufffd"


def test_no_picture_without_matplotlib(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "is_installed", lambda package: False)
    model = EncoderDecoder(len(task.DIGITS), len(task.WORDS), embed_dim=32, num_layers=1)
    assert words._draw(model.eval(), 123, tmp_path) is None
    expected = "  picture      none without matplotlib: pip install 'zeta-attention[demo]'\n"
    assert capsys.readouterr().out == expected
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(words.plots, "save", fail)
    model = EncoderDecoder(len(task.DIGITS), len(task.WORDS), embed_dim=32, num_layers=1)
    message = f"cannot write {tmp_path / 'cross-attention.png'}: No space left on device"
    with pytest.raises(terminal.InputError, match=re.escape(message)):
        words._draw(model.eval(), 123, tmp_path)


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_progress_passes_losses_on(has_tqdm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "is_installed", lambda package: has_tqdm)
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    assert list(terminal.progress([3.0, 2.0], 2, "training")) == [3.0, 2.0]
    assert isinstance(sys.stderr, FakeTerminal)
    shown = sys.stderr.getvalue()
    assert "training" in shown
    assert ("0/2  ? left" if has_tqdm else "2/2") in shown


def test_progress_is_silent_where_there_is_no_terminal(capsys: Captured) -> None:
    assert list(terminal.progress([3.0, 2.0], 2, "training")) == [3.0, 2.0]
    assert capsys.readouterr() == ("", "")


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "zeta"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"zeta {zeta.__version__}\n")
    wrong = subprocess.run([*command, "no"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("usage: zeta ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device without room")
def test_output_without_room_is_told_in_one_line() -> None:
    command = f"{sys.executable} -m zeta doctor > /dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("zeta doctor: ")
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_command_runs_where_nothing_can_be_written(tmp_path: Path, closed: str) -> None:
    file, output = tmp_path / "torch.pt", tmp_path / "zeta.pt"
    torch.save(torch.nn.MultiheadAttention(8, 2).state_dict(), file)
    command = f"{sys.executable} -m zeta convert {file} --from torch --output {output}"
    done = subprocess.run(
        ["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert output.exists()
