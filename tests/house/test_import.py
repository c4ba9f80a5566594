"""`import zeta` needs torch alone, and does nothing but define things."""

import subprocess
import sys

import pytest

OPTIONAL = (
    "accelerate",
    "hypothesis",
    "matplotlib",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "pytorch_lightning",
    "safetensors",
    "torchao",
    "tqdm",
    "transformers",
    "triton",
)

BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run(code: str, *options: str) -> str:
    """Runs code in a fresh interpreter that writes no bytecode; returns what it prints."""
    command = [sys.executable, "-B", *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_without_optional_packages_and_without_warnings() -> None:
    code = (
        BLOCK
        + """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch itself warns of the absent numpy
    import torch
warnings.simplefilter("error")
import zeta, zeta.nn
q = torch.randn(1, 2, 3, 4)
print(tuple(zeta.attention(q, q, q, mask=zeta.masks.Causal()).shape))
"""
    )
    assert run(code) == "(1, 2, 3, 4)\n"


def test_the_block_works() -> None:
    for name in OPTIONAL:
        code = BLOCK + f"\ntry: import {name}\nexcept ModuleNotFoundError: print('absent')"
        assert run(code) == "absent\n"


def test_nothing_is_started_written_or_reached() -> None:
    code = """
import sys
import torch
seen = []
watched = ("subprocess.Popen", "os.system", "os.fork", "os.exec", "socket.connect", "socket.bind")
def note(event, arguments):
    if event in watched:
        seen.append((event, arguments))
    if event == "open" and arguments[2] is not None and arguments[2] & 3:
        seen.append((event, arguments))
sys.addaudithook(note)
import zeta, zeta.nn
print(seen)
open("/dev/null", "w")
import subprocess
subprocess.run(["true"])
print([event for event, _ in seen])
"""
    first, second = run(code).splitlines()
    assert first == "[]"
    assert second in {"['open', 'subprocess.Popen']", "['open', 'subprocess.Popen', 'os.fork']"}


def test_nothing_is_patched() -> None:
    code = """
import torch
import torch.nn.functional as F
places = (torch, torch.nn, F, torch.Tensor, torch.nn.Module, torch.nn.MultiheadAttention)
before = [dict(vars(place)) for place in places]
def settings():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
settings_before = settings()
import zeta, zeta.nn
assert settings() == settings_before
for place, names in zip(places, before):
    for name, value in names.items():
        if name not in ("__annotations__", "__warningregistry__"):
            assert vars(place)[name] is value, (place, name)
"""
    run(code)


def test_nothing_heavy_is_loaded() -> None:
    code = """
import sys
import torch
before = set(sys.modules)
import zeta, zeta.nn
new = {name for name in set(sys.modules) - before}
print([name for name in sorted(new) if name.split(".")[0] not in ("zeta", "torch")
       and name.split(".")[0] not in sys.stdlib_module_names])
print([name for name in ("torch._inductor", "torch._dynamo", "triton", "matplotlib")
       if name in new])
print([name for name in sorted(new) if name.startswith("zeta.ops.backends.")])
"""
    assert run(code).splitlines() == ["[]", "[]", "[]"]


@pytest.mark.serial
def test_it_is_fast() -> None:
    code = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import zeta, zeta.nn
print(middle - start, time.perf_counter() - middle)
"""
    ratios = []
    for _ in range(2):
        torch_seconds, zeta_seconds = map(float, run(code).split())
        ratios.append(zeta_seconds / torch_seconds)
    assert min(ratios) < 0.25
