"""Lazy weights are a tensor in everything that a tensor can do; only later."""

import copy
import io
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from tests.ops.lazy import Small
from zeta.ops.attention import run_weights
from zeta.ops.weights import LazyWeights, lazy_weights

COEFFICIENTS = torch.linspace(-1, 2, 120, dtype=torch.float64).reshape(3, 2, 4, 5)

KNOWN: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda w: w.shape,
    "size": lambda w: (w.size(), w.size(-1), len(w), w.dim(), w.numel(), w.nbytes),
    "layout": lambda w: (w.stride(), w.is_contiguous(), w.storage_offset(), w.layout),
    "type": lambda w: (w.dtype, w.device, w.is_floating_point(), w.element_size(), w.type()),
    "autograd": lambda w: (w.requires_grad, w.is_leaf, w.grad_fn is None),
    "is a tensor": lambda w: (isinstance(w, Tensor), torch.is_tensor(w), w in [w]),
    "no-op conversions": lambda w: (
        w.to("cpu") is w,
        w.cpu() is w,
        w.double() is w,
        w.to(torch.float64) is w,
        torch.as_tensor(w) is w,
    ),
    "hooks": lambda w: w.retain_grad() if w.requires_grad else None,
}


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("question", KNOWN.values(), ids=KNOWN)
def test_what_is_known_costs_nothing(
    question: Callable[[Tensor], object], requires_grad: bool
) -> None:
    small = Small(requires_grad)
    weights = small.lazy()
    assert question(weights) == question(small.plain())
    assert small.compute.calls == []
    assert not weights.materialized


READ: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda w: 1 + w * 2 - w / (w + 1),
    "index": lambda w: w[0],
    "index ellipsis": lambda w: w[..., -1],
    "index slices": lambda w: w[1:, :, ::2, None],
    "index list": lambda w: w[[0, 2]],
    "index mask": lambda w: w[w > 0.3],
    "iterate": lambda w: torch.stack(list(w)),
    "compare": lambda w: (w == w) & (w >= w.mean()),
    "sum": lambda w: w.sum(-1),
    "max": lambda w: w.max(-1).indices,
    "matmul": lambda w: w @ torch.ones(5, 3, dtype=w.dtype),
    "einsum": lambda w: torch.einsum("hbts,bhst->bt", w, w.permute(1, 0, 3, 2)),
    "permute": lambda w: w.permute(1, 0, 2, 3),
    "contiguous": lambda w: w.contiguous(),
    "reshape": lambda w: w.reshape(-1),
    "cat": lambda w: torch.cat([w, w + 1]),
    "stack": lambda w: torch.stack([w, w]),
    "clone": lambda w: w.clone(),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "convert": lambda w: w.to(torch.float32),
    "where": lambda w: torch.where(w > 0.5, w, 0.0),
    "functional": lambda w: F.avg_pool2d(F.dropout(w, 0.1, training=False), 2),
    "module": lambda w: torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten())(w),
    "isclose": lambda w: torch.isclose(w, w.detach()),
    "topk of another dimension": lambda w: w.topk(1, dim=0).values,
    "median": lambda w: w.median(),
    "view of strides": lambda w: w.transpose(0, 1).view(2, -1),
    "new": lambda w: torch.zeros_like(w).copy_(w),
    "collate": lambda w: default_collate([w.detach(), w.detach()]),
    "copy": lambda w: copy.copy(w),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "save": lambda w: _saved(w),
    "numpy": lambda w: w.detach().numpy(),
    "numpy of itself": lambda w: w.numpy(force=True),
    "array": lambda w: np.asarray(w.detach()),
    "dlpack": lambda w: torch.from_dlpack(w.detach()),
    "list": lambda w: w.tolist(),
    "item": lambda w: w[0, 0, 0, 0].item(),
    "format": lambda w: f"{w.detach().sum():.4f}",
    "storage": lambda w: w.untyped_storage().nbytes(),
}


def _saved(weights: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"weights": weights}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["weights"]
    assert loaded.requires_grad == weights.requires_grad
    return loaded


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_reading_gives_what_a_plain_tensor_gives(
    read: Callable[[Tensor], object], requires_grad: bool
) -> None:
    small = Small(requires_grad)
    weights = small.lazy()
    got, expected = read(weights), read(small.plain())
    assert weights.materialized
    assert len(small.compute.calls) == 1
    if isinstance(expected, Tensor):
        assert type(got) is Tensor
        assert got.requires_grad == expected.requires_grad
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    else:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_printing_shows_numbers(requires_grad: bool) -> None:
    small = Small(requires_grad)
    printed = repr(small.lazy()).replace("LazyWeights(", "tensor(").replace("AttentionWeights", "")
    numbers = [line.strip() for line in printed.splitlines()]
    expected = [line.strip() for line in repr(small.plain().detach()).splitlines()]
    assert numbers[:11] == expected[:11]
    assert ("grad_fn=<Backward>" in printed) == requires_grad


def test_numbers_without_a_gradient_only() -> None:
    weights = Small().lazy()
    for take in (Tensor.numpy, LazyWeights.numpy, np.asarray):
        with pytest.raises((RuntimeError, TypeError)):
            take(weights)
    with pytest.raises(RuntimeError, match="Can't call numpy"):
        weights.numpy()


def test_a_value_is_shared_with_its_numpy_array() -> None:
    weights = Small(requires_grad=False).lazy()
    weights.numpy()[:] = 7.0
    assert (weights == 7.0).all()


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda w: w.mul_(2),
    "augmented": lambda w: _augmented(w),
    "part": lambda w: w[0].mul_(3),
    "item": lambda w: w.__setitem__((slice(None), 0), 0.5),
    "mask": lambda w: w.__setitem__(w < 0.1, 0.0),
    "fill": lambda w: w.masked_fill_(COEFFICIENTS > 1, 2.0),
    "copy": lambda w: w.copy_(COEFFICIENTS * w.detach()),
    "data": lambda w: w.data.mul_(2),
    "detached": lambda w: w.detach().zero_(),
    "out": lambda w: _written_by_out(w),
}


def _augmented(weights: Tensor) -> Tensor:
    weights += 1
    return weights


def _written_by_out(weights: Tensor) -> Tensor:
    with torch.no_grad():
        result = torch.mul(COEFFICIENTS, 2, out=weights.data)
    return result


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_place_is_that_of_a_plain_tensor(change: Callable[[Tensor], Tensor]) -> None:
    small = Small()
    results = []
    for weights in (small.lazy(), small.plain().clone()):
        view = weights[1]
        change(weights)
        loss = (weights * COEFFICIENTS).sum() + (view * COEFFICIENTS[1]).sum()
        results.append([weights.detach(), *torch.autograd.grad(loss, small.leaves)])
    torch.testing.assert_close(*results)


def test_what_changes_it_returns_it() -> None:
    weights = Small(requires_grad=False).lazy()
    assert weights.mul_(2) is weights
    assert torch.mul(COEFFICIENTS, 2, out=weights) is weights
    assert weights.apply_(lambda number: number + 1) is weights
    assert weights.map_(COEFFICIENTS, lambda own, other: own - other) is weights
    torch.testing.assert_close(weights.clone(), COEFFICIENTS + 1)


@pytest.mark.parametrize("name", ["t_", "squeeze_", "transpose_", "unsqueeze_", "resize_", "set_"])
def test_its_own_shape_stays(name: str) -> None:
    arguments = {"t_": (), "squeeze_": (), "transpose_": (0, 1), "unsqueeze_": (0,)}
    arguments |= {"resize_": (3, 2), "set_": (torch.zeros(3, dtype=torch.float64),)}
    weights = Small(requires_grad=False).lazy()
    with pytest.raises(RuntimeError, match="LazyWeights cannot change its shape in place"):
        getattr(weights, name)(*arguments[name])
    assert not weights.materialized


def test_its_data_cannot_be_replaced() -> None:
    weights = Small(requires_grad=False).lazy()
    with pytest.raises(RuntimeError, match="the data of LazyWeights cannot be replaced"):
        weights.data = COEFFICIENTS


def test_memory_taken_past_the_dispatcher_is_refused() -> None:
    weights = Small(requires_grad=False).lazy()
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(weights)
    assert torch.equal(torch.from_dlpack(weights), weights)


def test_deepcopy_is_that_of_a_tensor() -> None:
    weights = Small(requires_grad=False).lazy().requires_grad_()
    weights.sum().backward()
    first, second = copy.deepcopy([weights, weights])
    assert first is second
    assert first.data_ptr() != weights.data_ptr()
    torch.testing.assert_close(first, weights.detach().clone().requires_grad_())
    assert torch.equal(first.grad, torch.ones_like(weights))
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(Small().lazy())


def test_a_leaf_gathers_its_own_gradient() -> None:
    small = Small(requires_grad=False)
    weights = small.lazy().requires_grad_()
    (weights.rows(1) * weights.heads(0)[:, 1]).sum().backward()
    plain = small.plain().requires_grad_()
    (plain[..., 1, :] * plain[0, :, 1]).sum().backward()
    torch.testing.assert_close(weights.grad, plain.grad)


def test_threads_compute_once() -> None:
    small = Small(requires_grad=False)
    weights = small.lazy()
    start = threading.Barrier(8)
    sums: list[float] = []

    def read() -> None:
        start.wait()
        sums.append(weights.sum().item())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(small.compute.calls) == 1
    assert sums == [small.plain().sum().item()] * 8


def test_a_failure_is_not_remembered() -> None:
    small = Small(requires_grad=False)
    failures = [MemoryError("no memory")]

    def compute(call: object) -> Tensor:
        if failures:
            raise failures.pop()
        return run_weights(call, "reference")

    weights = lazy_weights(small.call(), compute)
    with pytest.raises(MemoryError, match="no memory"):
        weights.sum()
    assert not weights.materialized
    assert torch.equal(weights, small.plain(heads_first=False))


def test_on_the_meta_device() -> None:
    small = Small(requires_grad=False)
    small.query, small.key, small.table = (leaf.to("meta") for leaf in small.leaves)
    weights = small.lazy()
    assert weights.device.type == "meta"
    assert (weights + 1).shape == (3, 2, 4, 5)
    assert "device='meta'" in repr(weights)
