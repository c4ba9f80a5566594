"""Position biases as modules; their effect on attention is in ``test_attention.py``."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeta import biases
from zeta.nn import ALiBi, MultiheadAttention, RelativePositionBias


def test_parameters_are_torchscales() -> None:
    rel_pos = RelativePositionBias()
    assert {name: t.shape for name, t in rel_pos.state_dict().items()} == {
        "relative_attention_bias.weight": (32, 12)
    }
    assert (rel_pos.bidirectional, rel_pos.max_distance) == (True, 128)


@pytest.mark.parametrize("make", [RelativePositionBias, lambda n_heads: ALiBi(n_heads)])
def test_tensor_agrees_with_the_value_and_repeats_by_batch(make: Any) -> None:
    module = make(n_heads=6)
    tensor = module(3, 5, 5)
    assert tensor.shape == (18, 5, 5)
    expected = module.value().dense(1, 6, 5, 5)[0]
    for sample in tensor.split(6):
        assert torch.equal(sample, expected)


def test_step_is_the_position_of_the_first_query() -> None:
    rel_pos = RelativePositionBias(n_heads=4)
    whole = rel_pos(2, 300, 300)
    assert torch.equal(rel_pos(2, 1, 300, 299), whole[:, 299:])
    assert torch.equal(rel_pos(2, 2, 300, step=4), whole[:, 4:6])


def test_one_direction_has_all_buckets_for_the_past() -> None:
    rel_pos = RelativePositionBias(False, num_buckets=8, max_distance=16, n_heads=1)
    with torch.no_grad():
        rel_pos.relative_attention_bias.weight.copy_(torch.arange(8.0)[:, None])
    last_row = rel_pos(1, 32, 32)[0, -1]
    assert last_row.flip(0)[:5].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert last_row[0] == 7.0
    assert not rel_pos(1, 32, 32)[0].triu().any()


def test_reset_draws_anew() -> None:
    rel_pos = RelativePositionBias()
    before = rel_pos.relative_attention_bias.weight.clone()
    rel_pos.reset_parameters()
    assert not torch.equal(rel_pos.relative_attention_bias.weight, before)


def test_alibi_keeps_float32_slopes_and_no_state() -> None:
    alibi = ALiBi(12)
    exact = alibi.slopes.clone()
    assert alibi.state_dict() == {}
    assert list(alibi.parameters()) == []
    for moved in (copy.deepcopy(alibi).bfloat16(), copy.deepcopy(alibi).to_empty(device="cpu")):
        assert torch.equal(moved.slopes, exact)


def test_alibi_stays_on_its_device_beside_another_default() -> None:
    exact = ALiBi(4).slopes
    with torch.device("meta"):
        there, here = ALiBi(4), ALiBi(4, device="cpu")
        moved = ALiBi(4).to_empty(device="cpu").bfloat16()
    assert there.slopes.is_meta
    assert torch.equal(here.slopes, exact)
    assert torch.equal(moved.slopes, exact)


class Doubled(nn.Embedding):
    def forward(self, index: Tensor) -> Tensor:
        return 2 * super().forward(index)


@pytest.mark.parametrize("how", ["a class", "a method", "a hook"])
def test_what_makes_more_of_the_table_is_called(how: str) -> None:
    rel_pos = RelativePositionBias(n_heads=2)
    embedding = rel_pos.relative_attention_bias
    expected = 2 * rel_pos(1, 5, 5)
    if how == "a class":
        embedding.__class__ = Doubled
    elif how == "a method":
        embedding.forward = lambda index: 2 * embedding.weight[index]  # type: ignore[method-assign]  # on purpose
    else:
        embedding.register_forward_hook(lambda module, args, out: 2 * out)
    assert torch.equal(rel_pos(1, 5, 5), expected)
    rel_pos(1, 5, 5).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.sum() == 100


def test_values_carry_gradients_to_the_parameter() -> None:
    rel_pos = RelativePositionBias(n_heads=2)
    value = rel_pos.value()
    assert isinstance(value, biases.Bucketed)
    assert value.table is rel_pos.relative_attention_bias.weight


def test_structured_bias_is_never_made_a_tensor() -> None:
    """Neither for the output nor for its gradients: nothing as large as the scores is ever made."""
    length, heads = 1024, 2
    attention = MultiheadAttention(None, 16, heads, self_attention=True)
    rel_pos, x = RelativePositionBias(n_heads=heads), torch.randn(1, length, 16)
    largest = LargestTensor()
    with largest:
        out, _ = attention(x, x, x, rel_pos=rel_pos, is_causal=True)
        out.sum().backward()
    assert rel_pos.relative_attention_bias.weight.grad.any()
    assert largest.numel < heads * length * length


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the size of the largest floating-point tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result


def test_the_largest_tensor_is_noticed() -> None:
    with LargestTensor() as largest:
        torch.ones(3, 5).sum()
    assert largest.numel == 15


@pytest.mark.parametrize(
    "options", [{"num_buckets": 3}, {"num_buckets": 32, "max_distance": 8}], ids=str
)
def test_wrong_buckets_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_distance must exceed"):
        RelativePositionBias(**options)


def test_direction_that_is_no_flag_is_refused() -> None:
    with pytest.raises(TypeError, match="bidirectional must be True or False; got None"):
        RelativePositionBias(bidirectional=None)


@pytest.mark.parametrize("module", [RelativePositionBias(n_heads=2), ALiBi(2)], ids=["t5", "alibi"])
@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((-1, 3, 5), ValueError, "batch_size must be positive; got -1"),
        ((1, 0, 5), ValueError, "qlen must be positive; got 0"),
        ((1, 3, 5.0), TypeError, "klen must be an integer; got float"),
        ((1, 3, 5, 1.5), TypeError, "step must be an integer; got float"),
    ],
)
def test_wrong_sizes_are_refused(
    module: Any, sizes: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        module(*sizes)
