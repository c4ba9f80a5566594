"""What the chunked backend holds at once."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.blockwise import (
    bucketed,
    make,
    outcome,
    outcome_of_weights,
)
from zeta import biases, masks
from zeta.ops.backends import chunked


class _Largest(TorchDispatchMode):
    """Remembers the most elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(
                    self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize
                )
        return result


def test_nothing_of_target_by_source_is_made(small_blocks: None) -> None:
    length = 1024
    made = make(length, length, heads=2, key_heads=1, dtype=torch.float32)
    mask = masks.Causal() & masks.Padding(torch.tensor([900, length]))
    with _Largest() as seen:
        outcome(
            chunked,
            made,
            bias=bucketed(made) + biases.Softcap(9.0),
            mask=mask,
            dropout_p=0.1,
            seed=2,
        )
    assert 0 < seen.elements < length * length / 8


def test_mean_weights_hold_one_head_at_a_time(small_blocks: None) -> None:
    length = 512
    made = make(length, length, heads=8, key_heads=8, dtype=torch.float32)
    with _Largest() as seen:
        outcome_of_weights(chunked, made, "mean_weights", bias=bucketed(made))
    assert 0 < seen.elements <= 2 * length * length


_PEAK = """
import re
import torch
from zeta import biases, masks
from zeta.ops.backends import chunked
from zeta.ops.call import AttentionCall

def peak():  # Not getrusage: its peak is that of the process which started this one, too.
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])

def step(length):
    kept = [torch.randn(1, 8, length, 64).requires_grad_() for _ in range(3)]
    for leaf in kept:
        leaf.grad = torch.zeros_like(leaf)
    table = torch.randn(32, 8, requires_grad=True)
    incoming = torch.randn(1, 8, length, 64)
    before = peak()
    call = AttentionCall.checked(
        *kept, mask=masks.Causal(), bias=biases.Bucketed(table), dropout_p=0.1, seed=1)
    chunked.run(call)[0].backward(incoming)
    return peak() - before

step(512)  # Libraries, threads, code.
print(step({length}) // 1024)
"""


@pytest.mark.serial
@pytest.mark.parametrize(
    ("length", "most"), [(4096, 200), pytest.param(8192, 400, marks=pytest.mark.slow)]
)
def test_peak_memory_of_a_training_step(length: int, most: int) -> None:
    """In MiB, over inputs and gradients; one copy of the scores takes 512 MiB and 2 GiB."""
    script = _PEAK.replace("{length}", str(length))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < most
