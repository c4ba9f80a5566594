"""``torch.jit.trace``: a trace holds operators, not the numbers of the call that was traced."""

import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zeta
from zeta import BackendUnsupported, masks
from zeta.nn import MultiheadAttention, RelativePositionBias

# It is deprecated, and warns of every Python number that depends on a shape.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def traced(function: Callable[..., Tensor] | nn.Module, *example: Tensor) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: torch.jit.ScriptModule = torch.jit.trace(function, example, check_trace=False)
    return found


@pytest.mark.parametrize("length", [5, 200])
@pytest.mark.parametrize("mask", [None, masks.Causal(), masks.SlidingWindow(3)], ids=str)
def test_the_op(mask: masks.Mask | None, length: int) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return zeta.attention(query, key, value, mask=mask)

    shape = (1, 2, length, 16)
    program = traced(attend, *torch.randn(3, *shape).unbind())
    other = torch.randn(3, *shape).unbind()
    torch.testing.assert_close(program(*other), attend(*other))


def test_a_native_kernel_refuses() -> None:
    query = torch.randn(1, 2, 5, 16)
    with pytest.raises(BackendUnsupported, match=r"torch\.jit\.trace sees torch's own"):
        traced(lambda query: zeta.attention(query, query, query, backend="cpu"), query)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiheadAttention(
            None, 64, 4, self_attention=True, subln=True, need_weights=False
        )
        self.rel_pos = RelativePositionBias(n_heads=4)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(x, x, x, rel_pos=self.rel_pos, is_causal=True)
        return out


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # torch 2.14
@pytest.mark.parametrize("grad", [False, True])
def test_a_module_is_saved_and_loaded(grad: bool) -> None:
    layer = _Layer().eval()
    with torch.set_grad_enabled(grad):
        program = traced(layer, torch.randn(1, 3, 64))
        file = io.BytesIO()
        torch.jit.save(program, file)
        file.seek(0)
        x = torch.randn(1, 3, 64)
        torch.testing.assert_close(torch.jit.load(file)(x), layer(x))
