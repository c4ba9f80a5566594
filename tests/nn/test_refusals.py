"""What the module refuses: the argument, what was expected and what came."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from zeta import biases, masks
from zeta.caches import DynamicCache
from zeta.nn import ALiBi, MultiheadAttention, RelativePositionBias, RotaryEmbedding, XPos

B, H, T, S, E = 2, 4, 5, 7, 16


def make(args: Any = None, **options: Any) -> MultiheadAttention:
    return MultiheadAttention(args, **{"embed_dim": E, "num_heads": H, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be positive; got 0"),
        ({"num_heads": 3}, "embed_dim must be a multiple of num_heads.*; got 16 and 3"),
        ({"num_heads": 0}, "num_heads must be positive; got 0"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads; got 4 and 3"),
        ({"num_kv_heads": 0}, "num_kv_heads must be positive; got 0"),
        ({"head_dim": 0}, "head_dim must be positive; got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\); got -0.1"),
        ({"dropout": float("nan")}, r"dropout must be in \[0, 1\); got nan"),
        ({"scale": float("nan")}, "scale must be finite; got nan"),
        ({"scale": float("inf")}, "scale must be finite; got inf"),
        (
            {"self_attention": True, "encoder_decoder_attention": True},
            "at most one of self_attention and encoder_decoder_attention can be True; got both",
        ),
        ({"subln": True}, "subln=True needs self_attention=True"),
        (
            {"subln": True, "encoder_decoder_attention": True},
            "subln=True needs self_attention=True",
        ),
        ({"kdim": 0}, "kdim must be positive; got 0"),
        ({"vdim": -1}, "vdim must be positive; got -1"),
        ({"window": 0}, "window must be at least 1, the token itself; got 0"),
        ({"window": 2, "encoder_decoder_attention": True}, "window needs queries and keys of one"),
        ({"need_weights": "yes"}, "need_weights must be 'lazy', True, False or 'mean'; got 'yes'"),
        ({"qk_norm": "layer"}, "qk_norm must be 'rms', 'l2' or None; got 'layer'"),
        ({"args": {"xpos_rel_pos": True}}, "xpos_rel_pos=True needs self_attention=True"),
        ({"position": XPos(4)}, "position=XPos needs self_attention=True"),
        (
            {"position": RotaryEmbedding(4), "encoder_decoder_attention": True},
            "position=RotaryEmbedding needs self_attention=True",
        ),
        (
            {"position": XPos(4), "self_attention": True, "args": {"xpos_rel_pos": True}},
            "give only one",
        ),
    ],
    ids=str,
)
def test_constructor_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 16.0}, "embed_dim must be an integer; got float"),
        ({"num_heads": "4"}, "num_heads must be an integer; got str"),
        ({"head_dim": True}, "head_dim must be an integer; got bool"),
        ({"vdim": torch.tensor(4)}, "vdim must be an integer; got a torch.int64 tensor"),
        ({"dropout": "0.1"}, "dropout must be a number; got str"),
        ({"dropout": None}, "dropout must be a number; got NoneType"),
        ({"scale": "a"}, "scale must be a number; got str"),
        ({"scale": nn.Parameter(torch.tensor(0.3))}, "scale must be a number; got a torch.float32"),
        ({"window": "2"}, "window must be an integer; got str"),
        ({"window": 2.5}, "window must be an integer; got float"),
        *(
            ({"need_weights": given}, f"need_weights must be 'lazy', .*; got {given!r}")
            for given in (1, 0, 1.0, np.True_, None)
        ),
        *(
            ({name: given}, f"{name} must be True or False; got {given!r}")
            for name, given in (
                ("self_attention", "False"),
                ("encoder_decoder_attention", 8),
                ("subln", None),
                ("bias", "no"),
                ("add_bias_kv", None),
                ("add_zero_attn", 2),
            )
        ),
    ],
    ids=str,
)
def test_constructor_refuses_another_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: RelativePositionBias(n_heads=0), ValueError, "n_heads must be positive; got 0"),
        (lambda: RelativePositionBias(n_heads="4"), TypeError, "n_heads must be an integer"),
        (
            lambda: RelativePositionBias(num_buckets=8.0),
            TypeError,
            "num_buckets must be an integer",
        ),
        (
            lambda: RelativePositionBias(max_distance="9"),
            TypeError,
            "max_distance must be an integ",
        ),
        (lambda: ALiBi("4"), TypeError, "num_heads must be an integer; got str"),
        (lambda: RotaryEmbedding("8"), TypeError, "head_dim must be an integer; got str"),
        (lambda: RotaryEmbedding(8, rotary_dim=4.0), TypeError, "rotary_dim must be an integer"),
        (lambda: RotaryEmbedding(8, base="a"), TypeError, "base must be a number; got str"),
        (lambda: XPos("8"), TypeError, "head_dim must be an integer; got str"),
        (lambda: XPos(8, "512"), TypeError, "scale_base must be a number; got str"),
        (lambda: XPos(8, 0), ValueError, "scale_base must be positive and finite; got 0"),
        (
            lambda: XPos(8, float("inf")),
            ValueError,
            "scale_base must be positive and finite; got inf",
        ),
        (
            lambda: RotaryEmbedding(8, base=float("inf")),
            ValueError,
            "base must be positive and finite; got inf",
        ),
    ],
)
def test_what_goes_into_a_call_refuses_at_once(
    build: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


def test_numbers_of_numpy_are_numbers() -> None:
    sizes = np.array([E, H, 2])
    module = MultiheadAttention(
        None, *sizes[:2], np.float32(0.0), num_kv_heads=sizes[2], window=sizes[2], scale=sizes[2]
    )
    assert module(**inputs())[0].shape == (B, T, E)
    assert module.scale == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_tensor_for_sources_of_other_features_is_refused_by_name(dtype: torch.dtype) -> None:
    module, x = MultiheadAttention(None, E, H, kdim=E // 2, dtype=dtype), torch.ones(1, 32, E)
    with pytest.raises(ValueError, match=rf"key must have shape \(batch, length, {E // 2}\)"):
        module(*[x.to(dtype)] * 3)


@pytest.mark.parametrize("way", ["pruned", "parametrized"])
def test_weights_that_are_no_parameters_are_not_drawn(way: str) -> None:
    module = MultiheadAttention(None, E, H)
    if way == "pruned":
        prune.random_unstructured(module.k_proj, "weight", 0.5)
    else:
        parametrizations.weight_norm(module.k_proj)
    with pytest.raises(TypeError, match="reset_parameters draws the weight of a projection, but"):
        module.reset_parameters()


@pytest.mark.parametrize("module", [XPos(8), ALiBi(4)], ids=["xpos", "alibi"])
def test_modules_with_a_buffer_of_their_own_fill_it(module: torch.nn.Module) -> None:
    expected = [buffer.clone() for buffer in module.buffers()]
    for buffer in module.buffers():
        buffer.fill_(torch.nan)
    module.reset_parameters()
    torch.testing.assert_close(list(module.buffers()), expected, rtol=0, atol=0)


def test_constructor_refuses_a_position_that_cannot_rotate() -> None:
    with pytest.raises(TypeError, match="position must be a RotaryEmbedding or an XPos; got ALiBi"):
        make(position=ALiBi(4), self_attention=True)


def inputs(**changes: Any) -> dict[str, Any]:
    """Good arguments of a call, but for the changes."""
    source = torch.randn(B, S, E)
    return {"query": torch.randn(B, T, E), "key": source, "value": source, **changes}


CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"query": torch.randn(B, T, E + 1)},
        ValueError,
        r"query must have shape \(batch, length, 16\) or \(length, 16\); got \(2, 5, 17\)",
    ),
    (
        {"query": torch.randn(1, B, T, E)},
        ValueError,
        r"query must have shape .*; got \(1, 2, 5, 16\)",
    ),
    ({"query": None}, TypeError, "query must be a tensor; got NoneType"),
    ({"query": [[1.0]]}, TypeError, "query must be a tensor; got list"),
    ({"key": [[1.0]]}, TypeError, "key must be a tensor; got list"),
    ({"key": torch.ones(B, S, E).numpy()}, TypeError, "key must be a tensor; got ndarray"),
    ({"value": [[1.0]]}, TypeError, "value must be a tensor; got list"),
    ({"query": torch.randn(T, E), "key": [[1.0]]}, TypeError, "key must be a tensor; got list"),
    ({"query": torch.randn(B, 0, E)}, ValueError, r"query must not be empty; got \(2, 0, 16\)"),
    ({"query": torch.randn(3, T, E)}, ValueError, "one batch size; got 3, 2 and 2"),
    (
        {"key": torch.randn(B, S, E - 1)},
        ValueError,
        r"key must have shape \(batch, length, 16\); got",
    ),
    ({"value": torch.randn(B, S, 3)}, ValueError, r"value must have shape .*; got \(2, 7, 3\)"),
    (
        {"value": torch.randn(B, S - 1, E)},
        ValueError,
        "key and value must have the same length; got 7 and 6",
    ),
    (
        {"key": torch.randn(B, 0, E), "value": torch.randn(B, 0, E)},
        ValueError,
        r"key must not be empty; got \(2, 0, 16\)",
    ),
    ({"key": None, "value": None}, ValueError, "key and value must be given"),
    ({"value": None}, ValueError, "key and value must be given"),
    (
        {"attn_mask": torch.zeros(S, T)},
        ValueError,
        r"attn_mask must have shape \(5, 7\), .*; got \(7, 5\)",
    ),
    ({"attn_mask": torch.zeros(3, T, S)}, ValueError, r"\(8, 5, 7\).*; got \(3, 5, 7\)"),
    (
        {"attn_mask": torch.zeros(B, 3, T, S)},
        ValueError,
        r"attn_mask must have shape .*; got \(2, 3, 5, 7\)",
    ),
    ({"attn_mask": torch.zeros(S)}, ValueError, r"attn_mask must have shape .*; got \(7,\)"),
    (
        {"attn_mask": torch.zeros(T, S, dtype=torch.uint8)},
        TypeError,
        "bool or floating point; got torch.uint8",
    ),
    (
        {"attn_mask": torch.zeros(T, S, device="meta")},
        ValueError,
        "attn_mask must be on .* cpu; got meta",
    ),
    (
        {"attn_mask": [[True]]},
        TypeError,
        "attn_mask must be a tensor or a value from zeta.masks; got list",
    ),
    (
        {"attn_mask": biases.Softcap(2.0)},
        TypeError,
        "attn_mask must be a tensor or .*; got Softcap",
    ),
    (
        {"key_padding_mask": torch.zeros(B, T, dtype=torch.bool)},
        ValueError,
        r"\(2, 7\); got \(2, 5\)",
    ),
    ({"key_padding_mask": [[True]]}, TypeError, "key_padding_mask must be a tensor; got list"),
    (
        {"key_padding_mask": torch.zeros(B, S).numpy()},
        TypeError,
        "key_padding_mask must be a tensor; got ndarray",
    ),
    ({"key_padding_mask": 1}, TypeError, "key_padding_mask must be a tensor; got int"),
    ({"key_padding_mask": torch.zeros(B, S).long()}, TypeError, "key_padding_mask must be bool or"),
    (
        {"key_padding_mask": torch.zeros(B, S, device="meta")},
        ValueError,
        "key_padding_mask must be on the query's device cpu; got meta",
    ),
    (
        {"rel_pos": torch.zeros(3, T, S)},
        ValueError,
        r"rel_pos must have shape \(8, 5, 7\), \(4, 5, 7\)",
    ),
    (
        {"rel_pos": torch.zeros(B, 2, T, S)},
        ValueError,
        r"rel_pos must have shape .*; got \(2, 2, 5, 7\)",
    ),
    (
        {"rel_pos": torch.zeros(H, T, S).bool()},
        TypeError,
        "rel_pos must be floating point; got torch.bool",
    ),
    (
        {"rel_pos": RelativePositionBias(n_heads=3)},
        ValueError,
        "rel_pos must be for 4 heads; got one for 3",
    ),
    ({"rel_pos": ALiBi(8)}, ValueError, "rel_pos must be for 4 heads; got one for 8"),
    ({"rel_pos": masks.Causal()}, TypeError, "rel_pos must be a tensor, .*; got Causal"),
    ({"need_weights": "all"}, ValueError, "need_weights must be .*; got 'all'"),
    *(
        ({"is_causal": given}, TypeError, "is_causal must be True or False; got")
        for given in ("no", None, torch.tensor([True, False]))
    ),
    *(
        ({"need_weights": given}, TypeError, f"need_weights must be .*; got {given!r}")
        for given in (1, 0, 1.0, np.False_)
    ),
    ({"positions": torch.arange(T)}, ValueError, "neither position= nor multiway"),
    *(
        ({name: torch.ones(B, L, E).to(dtype)}, TypeError, f"{name} must have .* got {dtype}")
        for name, L, dtype in (
            ("query", T, torch.float64),
            ("key", S, torch.int64),
            ("value", S, torch.bfloat16),
        )
    ),
    (
        {"value": torch.ones(B, S, E, device="meta")},
        ValueError,
        "value must be on the parameters' device cpu; got meta",
    ),
    ({"incremental_state": []}, TypeError, "incremental_state must be a dict or .*; got list"),
    (
        {"incremental_state": DynamicCache},
        TypeError,
        "incremental_state must be a dict or a cache from zeta.caches; got",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), CALLS, ids=[c[2][:40] for c in CALLS])
def test_call_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()(**inputs(**changes))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_call_refuses_nested_tensors(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)], layout=layout)
    with pytest.raises(TypeError, match="query must not be a nested tensor: pad it"):
        make()(nested, nested, nested)


def test_the_unchanged_call_is_fine() -> None:
    out, _ = make()(**inputs())
    assert out.shape == (B, T, E)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (
            torch.arange(T + 1),
            ValueError,
            r"positions must have shape \(5,\) or \(1 or 2, 5\); got \(6,\)",
        ),
        (torch.zeros(3, T, dtype=torch.long), ValueError, r"got \(3, 5\)"),
        (torch.zeros(T), TypeError, "positions must be an integer tensor; got a torch.float32"),
        (list(range(T)), TypeError, "positions must be an integer tensor; got list"),
        (torch.arange(T, device="meta"), ValueError, "positions must be on the query's device cpu"),
        (3, TypeError, "positions must be an integer tensor; got int"),
    ],
)
def test_wrong_positions_are_refused(positions: Any, error: type[Exception], message: str) -> None:
    module, x = make(self_attention=True, position=RotaryEmbedding(4)), torch.randn(B, T, E)
    with pytest.raises(error, match=message):
        module(x, x, x, positions=positions)


@pytest.mark.parametrize(
    "make_one",
    [
        lambda: make(self_attention=True, position=RotaryEmbedding(4)),
        lambda: make({"xpos_rel_pos": True}, self_attention=True),
        lambda: make({"multiway": True}, self_attention=True),
    ],
    ids=["rotary", "xPos", "multiway"],
)
def test_positions_are_those_of_queries_and_keys(make_one: Callable[[], nn.Module]) -> None:
    for target, source in ((T, S), (S, T)):
        query, key = torch.randn(B, target, E), torch.randn(B, source, E)
        message = f"positions must be those .* alike, .*; got {target} queries and {source} keys"
        with pytest.raises(ValueError, match=message):
            make_one()(query, key, key, positions=torch.arange(target))
        with pytest.raises(ValueError, match=r"positions must have shape"):
            make_one()(query, key, key, positions=torch.arange(source))


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
@pytest.mark.parametrize("args", [None, {"multiway": True}], ids=str)
def test_other_layers_are_not_drawn(args: Any, name: str) -> None:
    module = make(args)
    part = module.get_submodule(name)
    setattr(part if args else module, "B" if args else name, nn.Identity())
    with pytest.raises(TypeError, match=r"projections that are nn\.Linear; got Identity"):
        module.reset_parameters()
