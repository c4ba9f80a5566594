"""A compiled call as the very first thing that a process does with the library."""

import subprocess
import sys

import pytest

SETUP = """
import torch
import zeta
from zeta import biases, masks
from zeta.nn import MultiheadAttention, RelativePositionBias

torch.manual_seed(0)
torch.set_num_threads(1)

def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
"""

MODULE = """
x = torch.randn(2, 9, 32, requires_grad=TRAINING)
bias = RelativePositionBias(False, n_heads=4)
module = MultiheadAttention({"xpos_rel_pos": True}, 32, 4, self_attention=True, subln=True)
compiled = torch.compile(module, fullgraph=True)

def step(attention):
    attention.train(TRAINING)
    out, weights = attention(x, x, x, rel_pos=bias, is_causal=True)
    if not TRAINING:
        return out, weights
    loss = out.square().mean() + weights.square().mean()
    leaves = [x, *module.parameters(), *bias.parameters()]
    return (out, weights, *torch.autograd.grad(loss, leaves))

if TRAINING:
    same(step(compiled), step(module))
else:
    with torch.inference_mode():
        same(step(compiled), step(module))
"""

OP = """
q, k, v = torch.randn(3, 2, 4, 33, 16).unbind()
table = torch.randn(32, 4, requires_grad=True)

def attend(q, k, v, table):
    mask = masks.Causal() & masks.SlidingWindow(5)
    bias = biases.Bucketed(table, max_distance=16) + biases.Softcap(3.0)
    return zeta.attention(q, k, v, mask=mask, bias=bias, dropout_p=0.1, seed=3)

compiled = torch.compile(attend, fullgraph=True)
got, expected = compiled(q, k, v, table), attend(q, k, v, table)
same(got, expected)
same(*(torch.autograd.grad(out.square().mean(), table) for out in (got, expected)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    ["TRAINING = True" + MODULE, "TRAINING = False" + MODULE, OP],
    ids=["training", "inference", "op"],
)
def test_compiled_whole_as_the_first_call(code: str) -> None:
    text = SETUP + code
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
