"""`zeta doctor`: what it says, and that it notices a backend that is wrong or broken."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zeta
from zeta.cli import main
from zeta.ops import backends
from zeta.ops.backends import chunked
from zeta.ops.backends.cpu import library


def test_every_backend_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    printed = capsys.readouterr().out
    assert f"  zeta         {zeta.__version__}\n" in printed
    assert f"  torch        {torch.__version__}\n" in printed
    parts = printed.split("Backends on ")[1:]
    assert len(parts) == 3 * (1 + torch.cuda.device_count())
    for part in parts:
        for name in backends.ORDER:
            assert f"\n  {name} " in part
        assert part.count(", chosen") == 1
    assert "\n  sdpa         no: its dropout is not drawn from" in parts[2]
    assert "\n  cpu          right to " in parts[0]
    assert "\n  reference    right to " in parts[0]
    assert "WRONG" not in printed


def fail(call: Any) -> Any:
    raise OSError("no such library\nand more")


def fail_silently(call: Any) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (fail_silently, "FAILED: NotImplementedError\n"),
        (lambda call: (chunked.run(call)[0] + 0.01, None), "WRONG by 1e-02"),
        (fail, "FAILED: OSError: no such library"),
    ],
)
def test_wrong_backend_is_noticed(
    run: Callable[[Any], Any],
    verdict: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(name: str) -> object:
        if name != "chunked":
            return original(name)
        return SimpleNamespace(NAME=name, unsupported=chunked.unsupported, run=run)

    original = backends.load
    monkeypatch.setattr(backends, "load", load)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"  chunked      {verdict}" in printed
    # The others are still judged.
    assert printed.count("\n  reference    right to ") == 3 * (1 + torch.cuda.device_count())


def test_a_device_that_does_not_work_is_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = torch.cuda.device_count()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found + 1)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"\nBackends on cuda:{found}\n  all          FAILED: " in printed
    assert printed.count("\n  reference    right to ") == 3 * (1 + found)


@pytest.mark.parametrize(("threads", "told"), [(1, "1 thread"), (2, "2 threads")])
def test_the_native_kernel_is_described(
    threads: int, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    main(["doctor"])
    part = capsys.readouterr().out.split("Native CPU kernel\n")[1].split("\n\n")[0]
    found = library.load()
    assert f"  library      {found.path}\n" in part
    assert f"  built for    {', '.join(found.built)}\n" in part
    assert f"  runs         {found.usable[-1]}, on {told}\n" in f"{part}\n"
    narrower = found.used_for(1)
    assert (f"  small calls  {narrower}: " in part) == (narrower != found.usable[-1])
    assert "short calls" not in part


def test_a_torch_that_does_not_offer_its_tensors_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library.load(), "direct", None)
    main(["doctor"])
    assert "  short calls  take longer: this torch does not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "  library      none: the native library is not built: that takes Linux"),
        (b"text", "  library      broken: "),
    ],
)
def test_a_native_kernel_that_is_not_there_is_described(
    content: bytes | None,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "library.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(library, "PATH", path)
    for cached in (library.load, library._find_obstacle):
        cached.cache_clear()
    try:
        main(["doctor"])
    finally:
        for cached in (library.load, library._find_obstacle):
            cached.cache_clear()
    printed = capsys.readouterr().out
    assert said in printed
    assert "\n  cpu          no: the native library " in printed
