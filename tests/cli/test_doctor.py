"""`zeta doctor`: what it says, and that it notices a wrong backend."""

from types import SimpleNamespace

import pytest
import torch

import zeta
from zeta.cli import main
from zeta.ops import backends
from zeta.ops.backends import chunked


def test_every_backend_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"  zeta         {zeta.__version__}\n" in printed
    assert f"  torch        {torch.__version__}\n" in printed
    parts = printed.split("Backends on ")[1:]
    assert len(parts) == 3 * (1 + torch.cuda.device_count())
    for part in parts:
        for name in backends.ORDER:
            assert f"\n  {name} " in part
        assert part.count(", chosen") == 1
    assert "no: it needs a CUDA device" in parts[0]
    assert "WRONG" not in printed


def test_wrong_backend_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> object:
        found = original(name)
        if name != "chunked":
            return found
        return SimpleNamespace(
            NAME=name,
            unsupported=chunked.unsupported,
            run=lambda call: (chunked.run(call)[0] + 0.01, None),
        )

    original = backends.load
    monkeypatch.setattr(backends, "load", load)
    assert main(["doctor"]) == 1
    assert "WRONG by 1e-02" in capsys.readouterr().out
