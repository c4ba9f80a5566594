"""What is not given to torch's fused CUDA kernels, asked of tensors without numbers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zeta.ops.backends import sdpa
from zeta.ops.call import AttentionCall


def _reasons(head_dim: int, dtype: torch.dtype, *, key_heads: int = 4) -> list[str]:
    with FakeTensorMode():
        query = torch.empty(1, 4, 9, head_dim, dtype=dtype, device="cuda")
        key = torch.empty(1, key_heads, 9, head_dim, dtype=dtype, device="cuda")
        return sdpa.unsupported(AttentionCall.checked(query, key, key))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "key_heads"),
    [(8, torch.float32, 4), (20, torch.float32, 4), (6, torch.bfloat16, 4), (9, torch.float16, 2)],
)
def test_what_they_take(head_dim: int, dtype: torch.dtype, key_heads: int) -> None:
    assert not _reasons(head_dim, dtype, key_heads=key_heads)


def test_what_runs_unfused() -> None:
    (reason,) = _reasons(6, torch.float32)
    assert reason.endswith("in float32 where head_dim is no multiple of 4; got 6")
    (reason,) = _reasons(8, torch.float32, key_heads=2)
    assert "grouped heads" in reason
