"""What the native kernels hold at once, scratch memory that torch does not see among it."""

import subprocess
import sys

import pytest

from zeta.ops.backends.cpu import library

pytestmark = [
    pytest.mark.serial,
    pytest.mark.slow,
    pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle())),
]

_PEAK = """
import re
import sys
import torch
import zeta
from zeta import biases, masks
from zeta.ops.attention import run_with_weights
from zeta.ops.call import AttentionCall

def peak():  # Not getrusage: its peak is that of the process which started this one, too.
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])

def step(length):
    query, key, value = (torch.randn(1, 2, length, 64).requires_grad_() for _ in range(3))
    table = torch.randn(32, 2, requires_grad=True)
    incoming = torch.randn(1, 2, length, 64)
    before = peak()
    call = dict(mask=masks.Causal(), bias=biases.Bucketed(table), backend="cpu")
    if sys.argv[1] == "training":
        out = zeta.attention(query, key, value, dropout_p=0.1, seed=1, **call)
        torch.autograd.grad(out, (query, key, value, table), incoming)
    elif sys.argv[1] == "mean":
        with torch.no_grad():
            zeta.attention_weights(query, key, reduce="mean", **call)
    else:  # What the others are measured by: all scores of one head.
        torch.ones(length, length)
    return peak() - before

step(512)  # Libraries, threads, code.
print(step(8192) // 1024)
"""
PLANE = 8192 * 8192 * 4 // 2**20
"""One head's scores, in MiB."""


def peak(kind: str) -> int:
    """How much memory a call takes beside what it is given, in MiB, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, kind], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_a_training_step_holds_nothing_of_target_by_source() -> None:
    assert 0 < peak("training") < PLANE // 4


def test_mean_weights_hold_their_own_plane_alone() -> None:
    assert PLANE * 3 // 4 < peak("mean") < PLANE * 5 // 4


def test_a_plane_of_scores_is_noticed() -> None:
    assert peak("plane") > PLANE * 3 // 4
