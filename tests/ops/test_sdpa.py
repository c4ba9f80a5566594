"""What torch's fused kernels are given."""

import pytest
import torch
from torch import Tensor

from zeta import attention, biases
from zeta.ops.backends import sdpa
from zeta.ops.call import AttentionCall

BIAS = torch.randn(40, 80, dtype=torch.float64)
LAID_OUT = {
    "dense": BIAS[:, :40],
    "transposed": BIAS[:, :40].mT,
    "strided": BIAS[:, ::2],
    "expanded": BIAS[:, :1].expand(4, 40, 40),
}


@pytest.mark.parametrize("layout", LAID_OUT)
def test_a_dense_bias_is_not_copied(layout: str) -> None:
    tensor: Tensor = LAID_OUT[layout]
    query = torch.randn(2, 4, 40, 16, dtype=torch.float64)
    call = AttentionCall.checked(query, query, query, bias=biases.Dense(tensor))
    made = sdpa._mask_tensor(call)
    assert made is not None
    assert made.data_ptr() == tensor.data_ptr()
    assert made.stride()[-2:] == tensor.stride()[-2:]
    found, expected = (
        attention(query, query, query, bias=biases.Dense(tensor), backend=name)
        for name in ("sdpa", "reference")
    )
    torch.testing.assert_close(found, expected)
