"""``torch.compile(fullgraph=True)``: equal numbers, unused weights dead code, few compilations."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import zeta
from tests.compile.captured import Captured
from zeta import biases, masks
from zeta.caches import PagedCache, PagePool
from zeta.nn import (
    ALiBi,
    MultiheadAttention,
    RelativePositionBias,
    RotaryEmbedding,
)

EMBED = 32
Run = Callable[[nn.Module], tuple[Tensor, Tensor | None]]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def tokens(length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, EMBED, generator=generator)


def attending(**arguments: Any) -> Run:
    x = tokens()
    return lambda module: module(x, x, x, **arguments)


PADDING = torch.arange(9) >= torch.tensor([[9], [6]])
MODULES: dict[str, tuple[dict[str, Any], Run]] = {
    "plain": ({}, attending()),
    "causal": ({}, attending(is_causal=True)),
    "padding and causal": ({}, attending(is_causal=True, key_padding_mask=PADDING)),
    "documented": (
        {"args": {"xpos_rel_pos": True}, "self_attention": True, "subln": True},
        attending(is_causal=True, key_padding_mask=PADDING),
    ),
    "learned bias": ({}, attending(is_causal=True, rel_pos=RelativePositionBias(n_heads=4))),
    "dense float mask": ({}, attending(attn_mask=tokens(9)[0, :, :9])),
    "float mask that learns": (
        {},
        attending(attn_mask=tokens(9)[0, :, :9].clone().requires_grad_()),
    ),
    "ALiBi and padding": ({}, attending(rel_pos=ALiBi(4), key_padding_mask=PADDING)),
    "mask value": (
        {},
        attending(attn_mask=masks.SlidingWindow(3) & masks.Padding(torch.tensor([9, 4]))),
    ),
    "grouped, normalised, windowed": (
        {"num_kv_heads": 2, "qk_norm": "rms", "window": 3, "self_attention": True},
        attending(rel_pos=ALiBi(4)),
    ),
    "rotary": ({"position": RotaryEmbedding(8), "self_attention": True}, attending()),
    "rotary, normalised, windowed, placed": (
        {
            "position": RotaryEmbedding(8),
            "qk_norm": "rms",
            "window": 3,
            "self_attention": True,
        },
        attending(positions=torch.arange(9).flip(0)),
    ),
    "multiway": ({"args": {"multiway": True}}, attending(split_position=4)),
    "ways by token": (
        {"args": {"multiway": 3}},
        attending(split_position=torch.arange(18).view(2, 9) % 3),
    ),
    "cross": (
        {"encoder_decoder_attention": True},
        lambda module: module(tokens(5), tokens(7), tokens(7)),
    ),
    "unbatched": ({}, lambda module: module(tokens()[0], tokens()[0], tokens()[0])),
    "weights now": ({"need_weights": True}, attending()),
    "weights averaged": ({"need_weights": "mean"}, attending()),
    "weights averaged, causal": ({"need_weights": "mean"}, attending(is_causal=True)),
    "no weights": ({"need_weights": False}, attending()),
}


def module_of(args: object = None, **options: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    return MultiheadAttention(args, EMBED, 4, **options)


def outcome(run: Run, module: nn.Module, own: nn.Module) -> list[Tensor]:
    """Output, weights, and in training the gradients of a loss on both."""
    out, weights = run(module)
    if not own.training:
        return [out] if weights is None else [out, torch.as_tensor(weights)]
    loss = out.square().sum()
    results = [out.detach()]
    if weights is not None:
        loss = loss + (weights * weights.detach()).sum()
        results.append(weights.detach())
    parameters = list(own.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    missing = (torch.zeros_like(parameter) for parameter in parameters)
    return results + [next(missing) if grad is None else grad for grad in found]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("options", "run"), MODULES.values(), ids=MODULES)
def test_the_module_compiles_whole(options: dict[str, Any], run: Run, training: bool) -> None:
    module = module_of(**options).train(training)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        results = outcome(run, compiled, module), outcome(run, module, module)
    for found, expected in zip(*results, strict=True):
        # Two kernels may have computed them, each with float32's error of its own: small beside
        # the largest gradient, not beside each.
        atol = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("backend", ["chunked", "reference", "sdpa"])
def test_the_op_compiles_whole(backend: str) -> None:
    query, key, value = (tokens().view(2, 9, 4, 8).transpose(1, 2).requires_grad_() for _ in "qkv")
    table = torch.linspace(-1, 1, 32 * 4).view(32, 4).requires_grad_()
    everything = {
        "mask": masks.Causal() & masks.Padding(torch.tensor([9, 5])),
        "bias": biases.Softcap(5.0) + biases.Bucketed(table, max_distance=20),
        "dropout_p": 0.2,
        "seed": 7,
    }
    arguments = {"mask": masks.Causal()} if backend == "sdpa" else everything

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return zeta.attention(query, key, value, backend=backend, **arguments)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    leaves = (query, key, value) if backend == "sdpa" else (query, key, value, table)
    results = [
        (out.detach(), *torch.autograd.grad(out.square().sum(), leaves))
        for out in (compiled(query, key, value), attend(query, key, value))
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def weights_of(captured: Captured) -> int:
    """How often weights are computed, whoever does it."""
    forward = [name for name in captured.operators if "backward" not in name]
    return sum("weights" in name or "softmax" in name for name in forward)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("used", [False, True])
def test_unused_weights_are_dead_code(used: bool, training: bool) -> None:
    attention = module_of(dropout=0.1).train(training)
    bias = RelativePositionBias(n_heads=4)
    x = tokens()

    def step(x: Tensor) -> Tensor:
        out, weights = attention(x, x, x, rel_pos=bias, is_causal=True)
        loss = out.square().sum()
        return loss + weights.square().sum() if used else loss

    captured = Captured()
    with torch.set_grad_enabled(training):
        loss = torch.compile(step, backend=captured.backend, fullgraph=True)(x)
        if training:
            loss.backward()
    assert any("attention" in name for name in captured.operators)
    assert weights_of(captured) == used


def compilations(module: nn.Module, runs: list[Run], backend: str = "eager") -> int:
    """How often a module is compiled for these runs, each checked against eager mode."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for run in runs:
        got, expected = run(compiled), run(module)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    return counter.frame_count


def of_lengths(*lengths: int, **arguments: Any) -> list[Run]:
    def run(length: int) -> Run:
        x = tokens(length)
        return lambda module: module(x, x, x, **arguments)

    return [run(length) for length in lengths]


def test_new_lengths_compile_once_more() -> None:
    assert compilations(module_of(), of_lengths(9, 12, 17)) == 2


HIDDEN, ADDED = torch.ones(9, 9).triu(1).bool(), torch.linspace(-1, 1, 4 * 81).view(4, 9, 9)
PLACES = torch.arange(27).view(3, 9)


def attending_op(heads: Tensor, **arguments: Any) -> Tensor:
    return zeta.attention(heads, heads, heads, **arguments)


Call = Callable[..., Tensor]
# Tokens attend with parts of buffers, of as many sequences (b) and tokens (t).
SLICES: dict[str, Callable[[Call, Tensor, int, int], Tensor]] = {
    "attn_mask": lambda module, x, b, t: module(x, attn_mask=HIDDEN[:t, :t]),
    "attn_mask of sequences": lambda module, x, b, t: module(
        x, attn_mask=HIDDEN.expand(3, 1, 9, 9)[:b, :, :t, :t]
    ),
    "key_padding_mask": lambda module, x, b, t: module(x, key_padding_mask=HIDDEN[:3][:b, :t]),
    "rel_pos": lambda module, x, b, t: module(x, rel_pos=ADDED[:, :t, :t]),
    "rel_pos of sequences": lambda module, x, b, t: module(
        x, rel_pos=ADDED.expand(3, 4, 9, 9)[:b, :, :t, :t]
    ),
    "positions": lambda module, x, b, t: module(x, positions=PLACES[:b, :t]),
    # The sizes of the queries are known before those of the buffers are.
    "masks.drop": lambda _, x, b, t: attending_op(x[:, None], mask=masks.drop(HIDDEN[:t, :t])),
    "biases.Dense": lambda _, x, b, t: attending_op(
        x[:, None], bias=biases.Dense(HIDDEN[:t, :t].float())
    ),
    "key_positions": lambda _, x, b, t: attending_op(x[:, None], key_positions=PLACES[:b, :t]),
}


@pytest.mark.parametrize("attend", SLICES.values(), ids=SLICES)
def test_a_slice_may_become_the_whole(attend: Call) -> None:
    """Torch then knows its sizes as numbers, and those of the queries as symbols."""
    attention = module_of(self_attention=True, position=RotaryEmbedding(8), need_weights=False)

    def module(x: Tensor, **arguments: Any) -> Tensor:
        return cast("Tensor", attention(x, x, x, **arguments)[0])

    def run(x: Tensor) -> Tensor:
        return attend(module, x, *x.shape[:2])

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for batch, length in ((2, 6), (3, 9), (2, 7)):
        x = torch.randn(batch, length, EMBED)
        torch.testing.assert_close(compiled(x), run(x), rtol=1e-5, atol=1e-5)


NUMBERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "window": lambda number: {"mask": masks.SlidingWindow(number)},
    "window and more": lambda number: {
        "mask": masks.SlidingWindow(number) & masks.Padding(LENGTHS)
    },
    "softcap": lambda number: {"bias": biases.Softcap(number + 0.25)},
    "scale": lambda number: {"scale": number / 4},
    "dropout_p": lambda number: {"dropout_p": number / 8, "seed": torch.tensor(7)},
    "seed": lambda number: {"dropout_p": 0.5, "seed": number},
}
LENGTHS = torch.tensor([5, 9])


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("arguments", NUMBERS.values(), ids=NUMBERS)
def test_numbers_may_be_unknown(arguments: Callable[[int], dict[str, Any]], backend: str) -> None:
    def run(x: Tensor, number: int) -> Tensor:
        return attending_op(x[:, None], backend=backend, **arguments(number))

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    found = [compiled(tokens(), number) for number in (2, 3, 5)]
    for number, out in zip((2, 3, 5), found, strict=True):
        torch.testing.assert_close(out, run(tokens(), number))
    assert not torch.allclose(found[0], found[2])


@pytest.mark.slow
def test_new_lengths_of_masks_and_biases_do_not_compile_each() -> None:
    bias = RelativePositionBias(n_heads=4)
    runs = of_lengths(19, 25, 40, 150, rel_pos=bias, is_causal=True)
    assert compilations(module_of(), runs, "aot_eager") <= 2
    torch._dynamo.reset()
    module = module_of({"xpos_rel_pos": True}, self_attention=True, window=4)
    assert compilations(module, of_lengths(19, 25, 40)) <= 2


def test_decoding_from_pages_does_not_compile_each_step() -> None:
    module = module_of({"xpos_rel_pos": True}, self_attention=True, need_weights=False).eval()
    counter = CompileCounterWithBackend("eager")
    pool = PagePool(64, 4, num_kv_heads=4, head_dim=EMBED // 4)
    runs = [(run, PagedCache(pool)) for run in (torch.compile(module, backend=counter), module)]
    counts = []
    with torch.no_grad():
        # Sequences of different lengths; then over pages and in them.
        for t in tokens(16).split([9, *[1] * 7], 1):
            padding = PADDING if t.shape[1] == 9 else None
            found, expected = (
                run(t, t, t, incremental_state=cache, key_padding_mask=padding)[0]
                for run, cache in runs
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            counts.append(counter.frame_count)
    assert runs[0][1].lengths == (16, 13)
    assert counts[-1] == counts[2] <= 6


# Where a compiled function meets a subclass that it does not know, torch looks at all attributes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_lazy_weights_enter_a_compiled_function() -> None:
    module = module_of()
    (_, weights), (_, expected) = attending()(module), attending(need_weights=True)(module)

    @torch.compile(backend="aot_eager")
    def loss(weights: Tensor) -> Tensor:
        return (weights * weights.log()).sum()

    parameters = [module.q_proj.weight, module.k_proj.weight]
    torch.testing.assert_close(
        torch.autograd.grad(loss(weights), parameters),
        torch.autograd.grad((expected * expected.log()).sum(), parameters),
    )
