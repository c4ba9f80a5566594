"""The kernels as compiled, on a GPU: the grid of all backends, and sizes that no other test
reaches.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.ops.bound import assert_within_bound
from tests.ops.cases import Case, taken, widened
from tests.ops.rotations import TURNINGS, Turning
from zeta import attention, attention_with_lse, biases, masks
from zeta.nn import MultiheadAttention, RotaryEmbedding
from zeta.ops import offsets, rotation
from zeta.ops.backends.triton import rotation as on_gpu
from zeta.positions import rotary_tables

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _id(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", taken("triton"), ids=_id)
def test_outputs_and_gradients(case: Case, dtype: torch.dtype) -> None:
    made = case.tensors(dtype, "cuda")
    actual = case.run(made, "triton")
    low = case.run(made, "reference")
    assert_within_bound(actual, low, case.run(widened(made), "reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("reduce", [None, "mean"])
@pytest.mark.parametrize("case", [case for case in taken("triton") if not case.dropout_p], ids=_id)
def test_weights_and_gradients(case: Case, reduce: str | None, dtype: torch.dtype) -> None:
    made = case.tensors(dtype, "cuda")
    actual = case.run_weights(made, "triton", reduce)
    low = case.run_weights(made, "reference", reduce)
    assert_within_bound(actual, low, case.run_weights(widened(made), "reference", reduce))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_two_runs_give_the_same_bits(head_dim: int, causal: bool) -> None:
    query, key, value, dout = (_random(2, 4, 1024, head_dim) for _ in range(4))
    table = torch.randn(32, 4, device="cuda", requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        out = attention(
            query, key, value, mask=masks.Causal() if causal else None, seed=1, dropout_p=0.1,
            bias=biases.Bucketed(table, bidirectional=not causal), backend="triton",
        )  # fmt: skip
        return out, *torch.autograd.grad(out, (query, key, value, table), dout)

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("length", [4096, 65536])
def test_sampled_rows_and_columns_of_long_sequences(length: int) -> None:
    query, key, value, dout = (_random(1, 2, length, 64) for _ in range(4))
    table = torch.randn(32, 2, device="cuda")
    bias = biases.Bucketed(table, bidirectional=False)
    out, lse = attention_with_lse(
        query, key, value, mask=masks.Causal(), bias=bias, backend="triton"
    )
    dquery, dkey, dvalue = torch.autograd.grad(out, (query, key, value), dout)
    q, k, v, d, o = (t.detach().double()[0, 1] for t in (query, key, value, dout, out))
    vector = bias.offset_vector(128).double()[1]
    delta = (o * d).sum(-1)
    position = torch.arange(length, device="cuda")

    def weights(rows: Tensor, columns: Tensor) -> Tensor:
        offset = position[columns] - position[rows][:, None]
        s = q[rows] @ k[columns].mT * 0.125 + vector[offset.clamp(-128, 128) + 128]
        return torch.where(offset <= 0, s - lse[0, 1, rows, None].double(), -torch.inf).exp()

    everything = slice(None)
    chosen = torch.randint(length, (32,), device="cuda")
    p = weights(chosen, everything)
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p.sum(-1)), atol=2e-5, rtol=0)
    _close(out[0, 1, chosen], p @ v)
    ds = p * (d[chosen] @ v.mT - delta[chosen, None])
    _close(dquery[0, 1, chosen], ds @ k * 0.125)
    p = weights(everything, chosen)
    _close(dvalue[0, 1, chosen], p.mT @ d)
    ds = p * (d @ v[chosen].mT - delta[:, None])
    _close(dkey[0, 1, chosen], ds.mT @ q * 0.125)


def _close(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < 5e-3, f"relative error {error:.2e}"


@pytest.mark.parametrize("layout", ["batch", "rows"])
def test_offsets_beyond_31_bits(layout: str) -> None:
    """The last batch entry, or the last rows of interleaved heads, lie past 2**31 elements."""
    if layout == "batch":
        batch, length, window = 260, 1024, 1024
    else:
        batch, length, window = 1, (1 << 18) + 1024, 512
    query, key, value, dout = (
        torch.randn(batch, length, 64, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(4)
    )
    mask = masks.SlidingWindow(window)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        q, k, v, d = (tensor.detach() for tensor in tensors)
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        out = attention(*leaves, mask=mask, backend="triton")
        return out.detach(), *torch.autograd.grad(out, leaves, d)

    whole = run(query, key, value, dout)
    # Two windows back, the last 512 rows see and are seen by nothing that is cut off.
    last = slice(-1024, None)
    part = run(*(tensor[-1:, :, last].clone() for tensor in (query, key, value, dout)))
    for complete, alone in zip(whole, part, strict=True):
        _close(complete[-1:, :, -512:], alone[:, :, -512:].double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turning", TURNINGS, ids=lambda turning: turning.name)
def test_rotations(turning: Turning, dtype: torch.dtype) -> None:
    turning.check(on_gpu.rotated, dtype, "cuda")
    part = None if turning.rotary_dim is None else 96
    # No longer: gradients of xPos are too large for float16 at a thousand positions.
    larger = dataclasses.replace(
        turning, length=300, heads=24, key_heads=3, head_dim=128, key_length=None, rotary_dim=part
    )
    larger.check(on_gpu.rotated, dtype, "cuda")


@pytest.mark.parametrize("position", [RotaryEmbedding(64, interleaved=False), None], ids=str)
def test_modules_rotate_by_the_kernel(
    position: RotaryEmbedding | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = MultiheadAttention(
        {"xpos_rel_pos": position is None}, 512, 8, self_attention=True, num_kv_heads=2,
        position=position, device="cuda",
    )  # fmt: skip
    x = torch.randn(2, 300, 512, device="cuda")
    weight = attention.q_proj.weight
    found = torch.autograd.grad(attention(x, x, x, is_causal=True)[0].sum(), weight)
    graphs = torch.compile(attention, fullgraph=True)(x, x, x, is_causal=True, need_weights=False)
    monkeypatch.setattr(rotation, "kernel_for", lambda tensors, tables: None)
    out, _ = attention(x, x, x, is_causal=True)
    torch.testing.assert_close(graphs[0], out, atol=1e-4, rtol=1e-4)
    expected = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rotations_beyond_31_bits() -> None:
    x = torch.randn(260, 1024, 64, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    table = rotary_tables(torch.arange(1024, device="cuda"), 128)
    turned = rotation.rotate_one(x, table)
    assert torch.equal(turned[-1:], rotation.rotate_one(x[-1:].clone(), table))


def test_buckets_are_kept_but_for_what_a_graph_records() -> None:
    """What a graph reads must last as long as it does."""
    table = torch.randn(18, 4, device="cuda")  # Of a number that no other test uses.
    query = torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        return attention(query, query, query, bias=biases.Bucketed(table), backend="triton")

    expected = run()
    found = offsets._middle.cache_info()
    assert torch.equal(run(), expected)
    assert offsets._middle.cache_info().misses == found.misses
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    # What is kept is freed, the views of it too, and others write where it was.
    offsets._middle.cache_clear()
    offsets._buckets.cache_clear()
    others = [torch.full_like(table, -1, dtype=torch.int64) for _ in range(100)]
    others += [torch.full((257,), -1, device="cuda") for _ in range(100)]
    graph.replay()
    del others
    assert torch.equal(out, expected)
