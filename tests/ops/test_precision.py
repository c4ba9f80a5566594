"""How exactly float32 is multiplied: who decides, and that it reaches the kernel."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import zeta
from zeta.ops.backends.cpu import layout, library
from zeta.ops.precision import float32_precision


@pytest.fixture(autouse=True)
def _as_at_the_start() -> Iterator[None]:
    yield
    zeta.set_float32_precision(None)
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        backend.matmul.fp32_precision = "none"  # type: ignore[attr-defined]  # torch's stubs lack it


@pytest.mark.parametrize(
    ("torchs", "set_", "asked", "found"),
    [
        ("highest", None, None, "highest"),
        ("high", None, None, "high"),
        ("medium", None, None, "high"),
        ("medium", "highest", None, "highest"),
        ("highest", "high", None, "high"),
        ("highest", "high", "highest", "highest"),
        ("highest", "highest", "high", "high"),
    ],
)
def test_the_nearest_decides(torchs: str, set_: Any, asked: Any, found: str) -> None:
    torch.set_float32_matmul_precision(torchs)
    zeta.set_float32_precision(set_)
    assert float32_precision(asked) == found


@pytest.mark.parametrize(
    ("cpus", "found"),
    [("none", "highest"), ("ieee", "highest"), ("tf32", "high"), ("bf16", "high")],
)
@pytest.mark.parametrize("gpus", ["ieee", "tf32"])
def test_torchs_newer_settings_decide_too(gpus: str, cpus: str, found: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = gpus
    torch.backends.mkldnn.matmul.fp32_precision = cpus  # type: ignore[attr-defined]  # see above
    assert float32_precision() == found
    query = torch.randn(1, 2, 9, 16)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return zeta.attention_with_lse(query, query, query, backend="cpu")[0]

    expected = attend(query)
    run = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(query), expected)


class Spy:
    """Passes records on, and keeps what they say of the precision."""

    def __init__(self, native: library.Library) -> None:
        self.seen: list[float] = []
        self.usable = native.usable
        self.multiplies_tiles = native.multiplies_tiles
        for name in ("forward", "backward", "weights", "decode"):
            setattr(self, name, self._wrapped(getattr(native, name)))

    def _wrapped(self, run: library.Pass) -> library.Pass:
        def noted(record: Any) -> int:
            self.seen.append(layout.Part("precision").read(record)[0])
            return run(record)

        return noted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_reaches_every_pass(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(library.load())
    monkeypatch.setattr(library, "load", lambda: spy)
    query = torch.randn(1, 2, 60, 16, dtype=dtype, requires_grad=True)
    high = dtype == torch.float32

    def run(**options: Any) -> set[float]:
        out, _ = zeta.attention_with_lse(query, query, query, backend="cpu", **options)
        weights = zeta.attention_weights(query, query, backend="cpu", **options)
        (out.sum() + weights.sum()).backward()
        zeta.attention(query[:, :, :1], query, query, backend="cpu", **options)
        seen = set(spy.seen)
        assert len(spy.seen) >= 5
        spy.seen.clear()
        return seen

    assert run() == {0}
    assert run(precision="high") == {high}
    zeta.set_float32_precision("high")
    assert run() == {high}
    assert run(precision="highest") == {0}


def test_lazy_weights_keep_that_of_their_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from zeta.ops.attention import run_weights
    from zeta.ops.call import AttentionCall
    from zeta.ops.weights import lazy_weights

    spy = Spy(library.load())
    monkeypatch.setattr(library, "load", lambda: spy)
    query = torch.randn(1, 2, 40, 16)
    call = AttentionCall.checked(query, query, query, result="weights", precision="high")
    weights = lazy_weights(call, lambda asked: run_weights(asked, "cpu"))
    assert weights.sum() > 0
    assert set(spy.seen) == {1}


@pytest.mark.parametrize("wrong", ["medium", "", 1])
def test_what_is_no_precision_is_refused(wrong: Any) -> None:
    query = torch.randn(1, 1, 2, 16)
    message = "precision must be 'highest', 'high' or None; got " + repr(wrong)
    with pytest.raises(ValueError, match=message):
        zeta.set_float32_precision(wrong)
    with pytest.raises(ValueError, match=message):
        zeta.attention(query, query, query, precision=wrong)
    with pytest.raises(ValueError, match=message):
        zeta.explain(query, query, query, precision=wrong)
