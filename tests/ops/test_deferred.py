"""What lazy weights copy of a call that is changed before they are computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.lazy import Counted
from zeta import biases
from zeta.ops.attention import run_weights
from zeta.ops.call import AttentionCall
from zeta.ops.deferred import MAX_COPIED
from zeta.ops.weights import LazyWeights, lazy_weights


def call_with(bias: torch.Tensor) -> AttentionCall:
    query, key = torch.randn(1, 1, bias.shape[-2], 4), torch.randn(1, 1, bias.shape[-1], 4)
    return AttentionCall.checked(query, key, key, bias=biases.Dense(bias), result="weights")


def test_a_small_learned_bias_is_copied() -> None:
    bias = torch.randn(1, 1, 1, MAX_COPIED).requires_grad_()
    call = call_with(bias)
    weights, expected = lazy_weights(call, Counted()), run_weights(call, "reference").detach()
    with torch.no_grad():
        bias.mul_(2)
        assert torch.equal(weights, expected)


def leaf(width: int) -> torch.Tensor:
    return torch.randn(1, 1, 1, width).requires_grad_()


@pytest.mark.parametrize(
    "make", [lambda: leaf(MAX_COPIED + 1), lambda: leaf(5) * 2], ids=["large", "computed from one"]
)
def test_what_is_no_small_parameter_is_not(make: Callable[[], torch.Tensor]) -> None:
    bias = make()
    weights = lazy_weights(call_with(bias), Counted())
    with torch.no_grad():
        bias.mul_(2)
        with pytest.raises(RuntimeError, match=r"a bias, .* has been changed in place since"):
            weights.sum()


def test_weights_lie_as_announced_however_they_were_computed() -> None:
    call = call_with(torch.randn(1, 1, 3, 5))
    expected = run_weights(call, "reference")
    weights = lazy_weights(call, lambda call: run_weights(call).mT.contiguous().mT)
    assert weights.stride() == expected.stride()
    assert weights.detach().stride() == expected.stride()
    torch.testing.assert_close(weights.view(-1), expected.view(-1))


@pytest.mark.parametrize("name", ["query", "key", "bias", "sinks"])
def test_negated_numbers_are_seen_where_the_whole_is_computed(name: str) -> None:
    # In float64, for which there is no native kernel.
    made = {
        "query": torch.randn(1, 2, 3, 4, dtype=torch.float64),
        "key": torch.randn(1, 2, 5, 4, dtype=torch.float64),
        "bias": torch.randn(2, 3, 5, dtype=torch.float64),
        "sinks": torch.randn(2, dtype=torch.float64),
    }

    def call(query: Tensor, key: Tensor, bias: Tensor, sinks: Tensor) -> AttentionCall:
        dense = biases.Dense(bias)
        return AttentionCall.checked(query, key, key, bias=dense, sinks=sinks, result="weights")

    negated = call(**made | {name: torch._neg_view(-made[name])})
    weights = lazy_weights(negated, run_weights)
    torch.testing.assert_close(weights.clone(), run_weights(call(**made), "reference"))


@pytest.mark.parametrize("name", ["rows", "heads", "mean"])
def test_a_part_may_be_asked_for_while_another_thread_computes_the_whole(name: str) -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    call = AttentionCall.checked(query, key, key, result="weights")
    expected = run_weights(call, "reference")
    weights = lazy_weights(call, run_weights)
    assert isinstance(weights, LazyWeights)
    ask = {"rows": lambda w: w.rows(0), "heads": lambda w: w.heads(1), "mean": lambda w: w.mean(1)}
    deferred, own = weights._deferred, weights._deferred.part

    def late(*arguments: Any, **options: Any) -> Tensor:
        deferred.value()  # As by the other thread, after this one saw that nothing was there.
        return own(*arguments, **options)

    class Late:
        """Stands where the call's weights are; `Deferred` has slots."""

        part = staticmethod(late)

        def __getattr__(self, name: str) -> Any:
            return getattr(deferred, name)

    weights._deferred = Late()  # type: ignore[assignment]  # all that is asked of it
    found = ask[name](weights)
    wanted = {"rows": expected[:, :, 0], "heads": expected[:, 1], "mean": expected.mean(1)}
    torch.testing.assert_close(found, wanted[name])
