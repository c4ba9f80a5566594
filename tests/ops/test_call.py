"""What the public functions refuse, what they choose, and what they say of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import zeta
from zeta import biases, masks
from zeta.ops import backends, offsets
from zeta.ops.backends import cpu
from zeta.ops.backends.triton import configs
from zeta.ops.call import AttentionCall


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    sizes = {"query": (2, 4, 5, 8), "key": (2, 4, 7, 8), "value": (2, 4, 7, 8)} | shapes
    return {name: torch.randn(size) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (
            {"query": (4, 5, 8)},
            r"query must be \(batch, heads, length, head_dim\); got \(4, 5, 8\)",
        ),
        ({"key": (1, 4, 7, 8)}, "one batch size; got 2, 1 and 2"),
        ({"value": (1, 4, 7, 8)}, "one batch size; got 2, 2 and 1"),
        ({"value": (2, 2, 7, 8)}, r"same heads and length; got \(2, 4, 7, 8\) and \(2, 2, 7, 8\)"),
        ({"value": (2, 4, 6, 8)}, r"same heads and length; got \(2, 4, 7, 8\) and \(2, 4, 6, 8\)"),
        ({"query": (2, 4, 5, 9)}, "same head_dim; got 9 and 8"),
        (
            {"key": (2, 3, 7, 8), "value": (2, 3, 7, 8)},
            "multiple of the key's; got 4 and 3",
        ),
        ({"query": (2, 4, 0, 8)}, "no dimension may be empty"),
        ({"key": (2, 4, 0, 8), "value": (2, 4, 0, 8)}, "no dimension may be empty"),
        ({"value": (2, 4, 7, 0)}, "no dimension may be empty"),
        (
            {"key": (2, 0, 7, 8), "value": (2, 0, 7, 8)},
            "multiple of the key's; got 4 and 0",
        ),
    ],
)
def test_shapes_that_do_not_fit(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        zeta.attention(**tensors(**shapes))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\); got 1.0"),
        ({"dropout_p": None}, TypeError, "dropout_p must be a number; got NoneType"),
        ({"dropout_p": "a"}, TypeError, "dropout_p must be a number; got str"),
        ({"dropout_p": torch.tensor(0.5)}, TypeError, "dropout_p .* got a torch.float32 tensor"),
        ({"scale": "a"}, TypeError, "scale must be a number; got str"),
        ({"scale": float("nan")}, ValueError, "scale must be finite; got nan"),
        ({"scale": -float("inf")}, ValueError, "scale must be finite; got -inf"),
        ({"scale": 10**400}, ValueError, "scale must be finite; got 1000"),
        ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an integer; got float"),
        ({"dropout_p": 0.1, "seed": "a"}, TypeError, "seed must be an integer; got str"),
        (
            {"dropout_p": 0.1, "seed": 2**63},
            ValueError,
            r"seed must be in .*; got 9223372036854775808",
        ),
        ({"dropout_p": 0.1, "seed": -(2**64)}, ValueError, "seed must be in .*; got -18446744073"),
        ({"query": None}, TypeError, "query must be a tensor; got NoneType"),
        ({"query": [[1.0]]}, TypeError, "query must be a tensor; got list"),
        ({"key": torch.ones(2, 4, 7, 8).numpy()}, TypeError, "key must be a tensor; got ndarray"),
        ({"value": None}, TypeError, "value must be a tensor; got NoneType"),
        (
            {"query_positions": [0, 1, 2, 3, 4]},
            TypeError,
            "query_positions must be a tensor; got list",
        ),
        ({"key_positions": 3}, TypeError, "key_positions must be a tensor; got int"),
        ({"sinks": [1.0] * 4}, TypeError, "sinks must be a floating-point tensor; got list"),
        ({"dropout_p": -0.1}, ValueError, "got -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "got nan"),
        ({"mask": torch.ones(5, 7)}, TypeError, "masks.keep.*got a torch.float32 tensor"),
        ({"bias": torch.ones(5, 7)}, TypeError, "biases.Dense.*got a torch.float32 tensor"),
        ({"bias": masks.Causal()}, TypeError, "zeta.biases value.*got Causal"),
        (
            {"mask": masks.keep(torch.ones(5, 6, dtype=torch.bool))},
            ValueError,
            r"\(2, 4, 5, 7\); got \(1, 1, 5, 6\)",
        ),
        (
            {"mask": masks.Padding(torch.tensor([1, 2], device="meta"))},
            ValueError,
            "query's device cpu; got meta",
        ),
        ({"backend": "flash"}, ValueError, "one of 'sdpa'.*got 'flash'"),
        (
            {"dropout_p": 0.1, "seed": torch.tensor([1])},
            ValueError,
            r"0-d int64 tensor; got torch.int64 \(1,\)",
        ),
        (
            {"query_positions": torch.arange(4)},
            ValueError,
            r"query_positions must have shape \(5,\) or \(1 or 2, 5\); got \(4,\)",
        ),
        (
            {"key_positions": torch.arange(7, dtype=torch.int32)},
            ValueError,
            "key_positions must be int64 on cpu; got torch.int32",
        ),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        zeta.attention(**tensors() | arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    parts = [torch.randn(length, 4, 8) for length in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
    with pytest.raises(TypeError, match="query must not be a nested tensor: pad it"):
        zeta.attention(nested, nested, nested)
    with pytest.raises(TypeError, match="key must not be a nested tensor"):
        zeta.attention_weights(torch.randn(2, 4, 5, 8), nested)


def test_dtypes_must_agree_and_float() -> None:
    made = tensors()
    with pytest.raises(ValueError, match=r"value must have the query's dtype.*float32.*float64"):
        zeta.attention(made["query"], made["key"], made["value"].double())
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"query must be float16, .* or float64; got a {dtype}"):
            zeta.attention(*(tensor.to(dtype) for tensor in made.values()))


SCALE = torch.tensor(0.3, requires_grad=True)
FUNCTIONS: dict[str, Callable[..., object]] = {
    "attention": zeta.attention,
    "with its log-sum-exp": zeta.attention_with_lse,
    "weights": lambda query, key, value, **options: zeta.attention_weights(query, key, **options),
    "explanation": zeta.explain,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("backend", ["auto", "reference", "chunked", "sdpa", "cpu"])
def test_a_scale_is_no_tensor(function: Callable[..., object], backend: str) -> None:
    """Its gradient would be lost."""
    for mask in (None, masks.Causal(), masks.PrefixLM(torch.tensor([1, 2]))):
        with pytest.raises(TypeError, match=r"scale must be a number; got a torch.float32 tensor"):
            function(**tensors(), mask=mask, scale=SCALE, backend=backend)


def compiled_attention(made: dict[str, torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """Of a scale."""
    torch._dynamo.reset()
    return torch.compile(lambda scale: zeta.attention(**made, scale=scale), backend="eager")


def test_a_scale_is_no_tensor_in_compiled_code_either() -> None:
    compiled = compiled_attention(tensors())
    with pytest.raises(TypeError, match=r"scale must be a number; got a torch.float32 tensor"):
        compiled(SCALE)


def test_a_scale_is_finite_in_compiled_code_too() -> None:
    made = tensors()
    compiled = compiled_attention(made)
    # Of the second number on it is a symbol.
    for scale in (0.5, 0.25, 0.125):
        torch.testing.assert_close(compiled(scale), zeta.attention(**made, scale=scale))
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be finite"):
            compiled(scale)


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked", "sdpa", "cpu"])
def test_a_scale_is_any_number(backend: str) -> None:
    made = tensors()
    expected = zeta.attention(**made, scale=2.0, backend="reference")
    for scale in (2, np.float32(2.0), np.float64(2.0), np.int64(2)):
        found = zeta.attention(**made, scale=scale, backend=backend)
        torch.testing.assert_close(found, expected)


OF_NUMPY: dict[str, tuple[Callable[[Any], dict[str, Any]], int | float, list[type]]] = {
    "window": (lambda n: {"mask": masks.SlidingWindow(n)}, 3, [np.uint8, np.int8, np.uint64]),
    "max_distance": (
        lambda n: {"bias": biases.Bucketed(torch.ones(8, 4).cumsum(0), max_distance=n)},
        20,
        [np.uint8, np.int8, np.uint64],
    ),
    "limit": (lambda n: {"bias": biases.Softcap(n)}, 0.5, [np.float16, np.float32]),
    "dropout": (lambda n: {"dropout_p": n, "seed": 5}, 0.5, [np.float16, np.float32]),
    "scale": (lambda n: {"scale": n}, 0.5, [np.float16, np.float32]),
}
"""Arguments of a number, the number, and types that have it, some with room for little else."""


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked", "cpu"])
@pytest.mark.parametrize("name", OF_NUMPY)
def test_numbers_of_numpy_do_not_wrap_around(name: str, backend: str) -> None:
    arguments, number, types = OF_NUMPY[name]
    made = tensors(query=(2, 4, 300, 8), key=(2, 4, 300, 8), value=(2, 4, 300, 8))
    expected = zeta.attention(**made, backend="reference", **arguments(number))
    # Buckets are kept, and then no longer found.
    offsets._buckets.cache_clear()
    for kind in types:
        found = zeta.attention(**made, backend=backend, **arguments(kind(number)))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_torch_gets_no_scale_that_lets_it_see_hidden_keys(scale: float) -> None:
    wide = {name: tensor[:, :2, :5].double() for name, tensor in tensors().items()}
    arguments = {**wide, "mask": masks.Causal(), "scale": scale}
    expected = zeta.attention(**arguments, backend="reference")
    torch.testing.assert_close(zeta.attention(**arguments), expected)
    with pytest.raises(zeta.BackendUnsupported, match="its scale must be positive"):
        zeta.attention(**arguments, backend="sdpa")


def test_reduce_is_checked() -> None:
    with pytest.raises(ValueError, match="reduce must be None or 'mean'; got 'sum'"):
        zeta.attention_weights(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), reduce="sum")


def test_a_named_backend_runs_or_raises_with_every_reason() -> None:
    made = tensors()
    with pytest.raises(zeta.BackendUnsupported) as refusal:
        zeta.attention(**made, bias=biases.Softcap(3.0), dropout_p=0.1, backend="sdpa")
    message = str(refusal.value)
    assert "query (2, 4, 5, 8)" in message
    assert "dropout 0.1" in message
    assert "- it cannot apply the bias Softcap" in message
    assert "- its dropout is not drawn from the counter-based hash" in message


TABLE = torch.randn(32, 4)
T5 = biases.Bucketed(TABLE)
T5_LEARNED = biases.Bucketed(TABLE.clone().requires_grad_())


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        ({}, "sdpa"),
        ({"mask": masks.Padding(torch.tensor([7, 3]))}, "sdpa"),
        ({"bias": T5}, "sdpa"),
        ({"bias": T5_LEARNED}, "chunked"),
        ({"dropout_p": 0.1}, "chunked"),
        ({"bias": biases.Softcap(3.0)}, "chunked"),
        ({"with_lse": True}, "chunked"),
        ({"backend": "reference"}, "reference"),
    ],
)
def test_what_auto_takes_where_the_native_kernels_do_not(
    arguments: dict[str, Any], backend: str
) -> None:
    wide = {name: tensor.double() for name, tensor in tensors().items()}
    explanation = zeta.explain(**wide, **arguments)
    assert explanation.backend == backend
    assert explanation.reasons[backend] == ()
    if arguments.get("backend") is None:
        before = list(explanation.reasons)[: list(explanation.reasons).index(backend)]
        assert all(explanation.reasons[name] for name in before)


def test_a_long_mask_is_never_made_into_a_tensor_for_torch() -> None:
    tensor = torch.randn(1, 1, 64, 4)
    mask = masks.SlidingWindow(3)
    explanation = zeta.explain(tensor, tensor, tensor, mask=mask)
    assert explanation.backend != "sdpa"
    assert "a tensor of 4096 elements, more than the 256 of the query" in str(explanation)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"bias": T5_LEARNED}, {"dropout_p": 0.1}, {"with_lse": True}, {"mask": masks.Causal()}],
)
def test_auto_takes_the_native_kernels_first(arguments: dict[str, Any]) -> None:
    large = torch.randn(1, 4, 200, 64)
    explanation = zeta.explain(large, large, large, **arguments)
    assert next(iter(explanation.reasons)) == "cpu"
    assert (explanation.backend == "cpu") == (cpu.library.obstacle() is None)


def test_an_explanation_names_every_backend() -> None:
    wide = {name: tensor.double() for name, tensor in tensors().items()}
    text = str(zeta.explain(**wide, dropout_p=0.1))
    assert text.startswith("chunked runs: query (2, 4, 5, 8)")
    assert "cpu: it has no kernels for torch.float64" in text
    assert "sdpa: its dropout is not drawn from the counter-based hash" in text
    assert "reference: can, but is asked later" in text


def test_an_explanation_leaves_torch_s_generator_alone() -> None:
    made, before = tensors(), torch.get_rng_state()
    zeta.explain(**made, dropout_p=0.1)
    assert torch.equal(torch.get_rng_state(), before)


def everything(backend: str, dtype: torch.dtype, target: int) -> dict[str, torch.Tensor]:
    """All that a call is given, masks and gradients among it."""
    given = {
        "query": torch.randn(2, 4, target, 8),
        "key": torch.randn(2, 2, 70, 8),
        "value": torch.randn(2, 2, 70, 8),
        "grad_out": torch.randn(2, 4, target, 8),
    }
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    given["padding"] = torch.tensor([70, 50])
    if backend != "sdpa":  # Which takes a mask, or a bias that does not learn.
        given |= {
            "keep": torch.rand(2, 4, target, 70) < 0.8,
            "bias": torch.randn(1, 4, target, 70).to(dtype),
            "table": torch.randn(16, 4).to(dtype),
        }
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [1, 3, 60])
@pytest.mark.parametrize("backend", ["auto", "cpu", "chunked", "sdpa", "reference"])
def test_arguments_are_never_written_to(backend: str, target: int, dtype: torch.dtype) -> None:
    given = everything(backend, dtype, target)
    before = {name: tensor.clone() for name, tensor in given.items()}
    mask: masks.Mask = masks.Padding(given["padding"])
    bias = None
    if "keep" in given:
        mask = mask & masks.keep(given["keep"])
        bias = biases.Dense(given["bias"]) + biases.Bucketed(given["table"], max_distance=20)
    call = {"mask": mask, "bias": bias, "backend": backend}
    operands = [given[name] for name in ("query", "key", "value")]
    names = ("query", "key", "value", "bias", "table")
    leaves = [tensor for name, tensor in given.items() if name in names]
    with torch.no_grad():
        zeta.attention(*operands, **call)
        if backend != "sdpa":
            zeta.attention_weights(*operands[:2], **call)
            zeta.attention_weights(*operands[:2], reduce="mean", **call)
    for leaf in leaves:
        leaf.requires_grad_()
    out = zeta.attention(*operands, **call)
    torch.autograd.grad(out, leaves, given["grad_out"], allow_unused=True)
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name]), name


def seeded(draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(11)
    return draw()


def test_dropout_follows_torch_s_generator_and_the_seed() -> None:
    made = tensors()

    def draw() -> torch.Tensor:
        return zeta.attention(**made, dropout_p=0.5)

    assert torch.equal(seeded(draw), seeded(draw))
    assert not torch.equal(draw(), draw())
    one = zeta.attention(**made, dropout_p=0.5, seed=3)
    assert torch.equal(one, zeta.attention(**made, dropout_p=0.5, seed=torch.tensor(3)))
    reference = zeta.attention(**made, dropout_p=0.5, seed=3, backend="reference")
    torch.testing.assert_close(one, reference)


def test_a_few_grouped_queries_on_a_gpu_s_long_cache_go_to_triton_first() -> None:
    def first(target: int, heads: int, source: int) -> str:
        with torch.device("meta"):
            query, key = torch.empty(1, heads, target, 64), torch.empty(1, 4, source, 64)
        return backends.order(AttentionCall(query, key, key))[0]

    assert first(target=1, heads=16, source=8192) == "triton"
    assert first(target=32, heads=16, source=8192) == "triton"
    assert first(target=33, heads=16, source=8192) == "sdpa"
    assert first(target=1, heads=16, source=1023) == "sdpa"
    assert first(target=1, heads=4, source=8192) == "sdpa"
    assert backends.MAX_PACKED == configs.SPLIT_ROWS
