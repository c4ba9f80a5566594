"""The native library: that it is there, what it says of itself, and the border to it."""

import math
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zeta
from zeta import biases, masks
from zeta.ops import projection as ops_projection
from zeta.ops.backends import cpu
from zeta.ops.backends.cpu import layout, library, passes, projection
from zeta.ops.call import AttentionCall

HEADER = Path(cpu.__file__).parent / "native" / "abi.h"
MEMBERS = {"ZetaRows": 4, "ZetaPlane": 6, "ZetaLabels": 2}


def test_it_is_built_where_it_can_be() -> None:
    can = platform.system() == "Linux" and platform.machine() == "x86_64"
    if can and any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        found = library.load()
        assert "AVX2" in found.built
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        assert ("AVX2" in found.processor) == bool(re.search(r"^flags.* avx2\b", flags, re.M))
        for name, flag in (("AVX-512", "avx512bw"), ("AVX-512 BF16", "avx512_bf16")):
            has_flag = bool(re.search(rf"^flags.* {flag}\b", flags, re.M))
            assert (name in found.processor) == has_flag
        assert set(found.usable) == set(found.built) & set(found.processor)
    else:
        assert library.obstacle() is not None


def declared_fields(text: str) -> list[tuple[str, int, str]]:
    """Name, number of 8-byte words and format of each field of ``ZetaCall``."""
    text = re.sub(r"//.*", "", text)
    body = re.search(r"\{([^{}]*)\} ZetaCall;", text)
    assert body is not None
    found = []
    for declaration in body[1].split(";"):
        kind, _, names = declaration.strip().removeprefix("const ").partition(" ")
        for name in names.split(","):
            words = 1 if "*" in name else MEMBERS.get(kind, 1)
            plain = re.sub(r"_[A-Z]+$", "", name.strip(" *"))
            if plain:
                found.append((plain, words, "d" if kind == "double" and "*" not in name else "q"))
    return found


def test_the_layout_is_that_of_the_header() -> None:
    fields = declared_fields(HEADER.read_text(encoding="utf-8"))
    assert [name for name, _, _ in fields] == list(layout.OFFSETS)
    assert "".join(code * words for _, words, code in fields) == layout.FORMAT


def test_another_layout_is_seen() -> None:
    fields = declared_fields("typedef struct { int64_t bytes; ZetaRows a, b; double s; } ZetaCall;")
    assert fields == [("bytes", 1, "q"), ("a", 4, "q"), ("b", 4, "q"), ("s", 1, "d")]


def test_the_numbers_are_those_of_the_headers() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in HEADER.parent.glob("*.h"))
    numbers = {
        "ZETA_MOST_FEATURES": cpu.MAX_HEAD_DIM,
        "ZETA_STEP_ROWS": passes.STEP_ROWS,
        "ZETA_STEP_ROWS_BESIDE_TILES": passes.STEP_ROWS_BESIDE_TILES,
        "ZETA_MOST_ROWS": projection.MAX_ROWS,
        "ZETA_DONE": library.DONE,
        "ZETA_NO_MEMORY": library.NO_MEMORY,
        "ZETA_NOT_PLAIN": library.NOT_PLAIN,
    }
    declared = {name: re.findall(rf"\b{name} = (\d+)", text) for name in numbers}
    assert declared == {name: [str(number)] for name, number in numbers.items()}
    assert ops_projection.MAX_ROWS == projection.MAX_ROWS


def test_a_part_is_written_where_it_belongs() -> None:
    record = layout.Record()
    layout.Part("scale", "window").write(record, 0.5, 1, 7)
    assert layout.Part("window").read(record) == (7,)
    assert layout.Part("key_heads", "value_dim").read(record) == (0,) * 5
    assert layout.Part("scale").read(record) == (0.5,)


def test_a_record_of_another_size_is_refused() -> None:
    record = layout.Record()
    layout.Part("bytes").write(record, layout.NUM_BYTES - 8)
    for run in ("forward", "backward", "weights", "decode"):
        with pytest.raises(RuntimeError, match="library refuses: it is of another version"):
            library.check(getattr(library.load(), run)(record))


@pytest.mark.parametrize("number", [-1, 9])
def test_an_instruction_set_that_is_not_there_is_refused(number: int) -> None:
    native = library.load()
    before = native.instruction_set
    with pytest.raises(ValueError, match=f"instruction set {number} cannot run here, only "):
        native.instruction_set = number
    assert native.instruction_set == before


def test_short_calls_spare_processors_that_wide_vectors_slow_down() -> None:
    native = library.load()
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    named = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", text, re.M))
    is_slow = named == {"vendor_id": "GenuineIntel", "cpu family": "6", "model": "85"}
    best = native.usable[-1]
    short = "AVX2" if is_slow else best
    assert native.used_for(1) == native.used_for(2**18) == short
    assert native.used_for(2**18 + 1) == native.used_for(math.inf) == best


@pytest.mark.parametrize("length", [32, 33])
def test_a_call_runs_on_what_is_said(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    native = library.load()
    x = torch.randn(1, 2, length, 64)
    found = zeta.attention(x, x, x, backend="cpu")
    used = native.used_for(2 * x.numel() * length)
    assert used is not None
    monkeypatch.setattr(native, "instruction_set", library.INSTRUCTION_SETS.index(used) + 1)
    assert torch.equal(found, zeta.attention(x, x, x, backend="cpu"))
    if "AVX-512" in native.usable:
        monkeypatch.setattr(native, "instruction_set", 2 if used == "AVX2" else 1)
        assert not torch.equal(found, zeta.attention(x, x, x, backend="cpu"))


def test_answers_become_errors() -> None:
    library.check(0)
    with pytest.raises(MemoryError, match="there is no memory left"):
        library.check(library.NO_MEMORY)
    with pytest.raises(RuntimeError, match="answer 77"):
        library.check(77)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package looks for its library at this path."""
    monkeypatch.setattr(library, "PATH", tmp_path / "library.so")
    library.load.cache_clear()
    library._find_obstacle.cache_clear()
    yield tmp_path / "library.so"
    library.load.cache_clear()
    library._find_obstacle.cache_clear()


def _call(**changes: object) -> AttentionCall:
    query = torch.randn(1, 2, 3, 16)
    return AttentionCall.checked(query, query, query, **changes)  # type: ignore[arg-type]


def test_without_it_the_others_run_and_say_why(elsewhere: Path) -> None:
    query = torch.randn(1, 2, 3, 16)
    reason = "the native library is not built: that takes Linux on x86-64 and a C++ compiler"
    assert cpu.unsupported(_call())[0].startswith(reason)
    with pytest.raises(zeta.BackendUnsupported, match=re.escape(reason)):
        zeta.attention(query, query, query, backend="cpu")
    assert zeta.attention(query, query, query).shape == query.shape
    assert reason in str(zeta.explain(query, query, query))


def test_a_broken_file_is_no_library(elsewhere: Path) -> None:
    elsewhere.write_bytes(b"\x7fELF, and then nothing")
    (reason,) = cpu.unsupported(_call())
    assert reason.startswith("the native library cannot be loaded: ")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no compiler")
def test_a_library_without_direct_calls_is_of_another_version(elsewhere: Path) -> None:
    source = elsewhere.with_suffix(".c")
    source.write_text(f"long zeta_abi_bytes(void) {{ return {layout.NUM_BYTES}; }}")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", elsewhere, source], check=True)
    (reason,) = cpu.unsupported(_call())
    assert reason.endswith("is of another version: it has not the same direct calls")


def test_an_old_processor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    native = library.load()
    monkeypatch.setattr(native, "usable", ())
    monkeypatch.setattr(native, "processor", ())
    monkeypatch.setattr(native, "built", ("AVX2", "AMX"))
    library._find_obstacle.cache_clear()
    try:
        assert cpu.unsupported(_call()) == [
            "it needs a processor with AVX2 or AMX; this one has none of them"
        ]
    finally:
        library._find_obstacle.cache_clear()


def test_what_it_cannot_do_has_a_reason() -> None:
    wide, meta = torch.randn(1, 2, 3, 300), torch.randn(1, 2, 3, 16, device="meta")
    assert cpu.unsupported(AttentionCall.checked(wide, wide, wide)) == [
        "its head_dim goes up to 256; got 300 and 300"
    ]
    assert cpu.unsupported(AttentionCall.checked(meta, meta, meta)) == [
        "it computes on the CPU; got tensors on meta"
    ]
    double = torch.randn(1, 2, 3, 16, dtype=torch.float64)
    assert cpu.unsupported(AttentionCall.checked(double, double, double)) == [
        "it has no kernels for torch.float64"
    ]
    assert cpu.unsupported(_call(mask=masks.Causal() | masks.SlidingWindow(2))) == [
        "it cannot apply the mask AnyOf"
    ]
    t5, cap = biases.Bucketed(torch.randn(32, 2, requires_grad=True)), biases.Softcap(3.0)
    assert cpu.unsupported(_call(bias=cap + t5 + biases.Softcap(2.0))) == [
        "it applies one soft cap; got 2"
    ]
    assert cpu.unsupported(_call(bias=t5 + cap + biases.Dense(torch.zeros(3, 3)))) == [
        "its soft cap comes before or after everything that is added"
    ]
    assert cpu.unsupported(_call(bias=t5, query_positions=torch.arange(3))) == [
        "it finds no gradient of an offset bias under explicit positions"
    ]
    endless = biases.Bucketed(torch.randn(32, 2), max_distance=2**21)
    assert cpu.unsupported(_call(bias=endless)) == []
    assert cpu.unsupported(_call(bias=endless, key_positions=torch.arange(3))) == [
        "it needs an offset bias that ends within a bounded distance"
    ]
    far = torch.tensor([0, 1, 2**30])
    assert cpu.unsupported(_call(query_positions=far, key_positions=-far)) == [
        "its positions go up to 1073741823; got 1073741824",
        "its positions begin at -1073741823; got -1073741824",
    ]
    assert cpu.unsupported(_call(query_positions=far - 1, key_positions=far - 1)) == []


UNUSUAL: dict[str, dict[str, object]] = {
    "lengths of any size": {"mask": masks.Padding(torch.tensor([-5, 2**62]))},
    "prefixes of any size": {"mask": masks.PrefixLM(torch.tensor([-(2**62), 2**62]))},
    "lengths in int8": {"mask": masks.Padding(torch.tensor([3, 9], dtype=torch.int8))},
    "a window of any size": {"mask": masks.SlidingWindow(2**63 - 1)},
    "a mask along the other dimension": {"mask": masks.keep((torch.rand(11, 9) > 0.5).T)},
    "a bias along the other dimension": {"bias": biases.Dense(torch.randn(11, 9).T)},
    "a repeated bias": {"bias": biases.Dense(torch.randn(1, 11).expand(9, 11))},
    "a bias in float64": {"bias": biases.Dense(torch.randn(9, 11, dtype=torch.float64))},
    "a bias in float8": {"bias": biases.Dense(torch.randn(9, 11).to(torch.float8_e4m3fn))},
    "every second slope": {"bias": biases.Alibi(torch.rand(8)[::2])},
    "documents in int8": {"mask": masks.Documents(torch.randint(0, 3, (2, 11)).to(torch.int8))},
    "the last positions there are": {
        "query_positions": torch.full((9,), 2**30 - 1),
        "key_positions": torch.full((11,), 2**30 - 3),
        "mask": masks.SlidingWindow(3) & masks.Padding(torch.tensor([2**31, 2**31])),
        "bias": biases.Alibi(torch.rand(4)),
    },
    "positions from end to end": {
        "query_positions": torch.full((9,), -(2**30) + 1),
        "key_positions": torch.full((11,), 2**30 - 1),
    },
    "a scale below 0": {"scale": -0.5},
    "a seed below 0": {"dropout_p": 0.5, "seed": -3},
}


@pytest.mark.parametrize("options", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_arguments_give_what_the_reference_gives(options: dict[str, Any]) -> None:
    query = torch.randn(2, 4, 9, 16)
    key, value = torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, 24)
    found = zeta.attention(query, key, value, backend="cpu", **options)
    expected = zeta.attention(query, key, value, backend="reference", **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    unaligned = torch.randn(2 * 4 * 9 * 16 + 1).to(dtype)[1:].view(2, 4, 9, 16)
    forms = [
        unaligned,
        unaligned[:1].expand(2, 4, 9, 16),
        unaligned[..., :1].expand(2, 4, 9, 16),
        unaligned[:, :, ::2],
        unaligned[..., ::2],
        unaligned.mT,
        unaligned.transpose(1, 2),
    ]
    for form in forms:
        expected = zeta.attention(*[form.contiguous()] * 3, backend="cpu")
        assert torch.equal(zeta.attention(form, form, form, backend="cpu"), expected)


def test_a_default_device_or_dtype_changes_nothing() -> None:
    query = torch.randn(1, 2, 9, 16)
    expected = zeta.attention(query, query, query, mask=masks.Causal(), backend="cpu")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = zeta.attention(query, query, query, mask=masks.Causal(), backend="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
