"""The module against the textbook: sizes, gradients, weights, dropout, parameters."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nn import textbook
from tests.nn.attentions import EXACT, B, E, H, S, T, check_same, check_same_gradients, make, tokens
from zeta.nn import MultiheadAttention, RotaryEmbedding

SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"num_heads": 1},
    "grouped heads": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 6},
    "kdim and vdim": {"kdim": 10, "vdim": 12},
    "no bias": {"bias": False},
    "scale": {"scale": 0.9},
    "sub-LN": {"self_attention": True, "subln": True},
    "all": {"num_kv_heads": 2, "head_dim": 6, "kdim": 10, "vdim": 12, "bias": False, "scale": 0.2},
}


@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES.keys())
def test_sizes_and_gradients(options: dict[str, Any]) -> None:
    module = make(**options)
    query, key, value = tokens(T), tokens(S, module.kdim), tokens(S, module.vdim)
    inputs = [t.requires_grad_() for t in (query, key, value)] + list(module.parameters())
    expected = textbook.attend(module, query, key, value)
    check_same_gradients(module(query, key, value), expected, inputs)


@pytest.mark.parametrize("kind", ["rms", "l2"])
def test_query_key_norm_comes_before_the_rotation(kind: Any) -> None:
    module = make(self_attention=True, qk_norm=kind, position=RotaryEmbedding(4), scale=3.0)
    if kind == "rms":
        for norm in (module.q_norm, module.k_norm):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = tokens(T)
    normed = []
    for projection, norm in ((module.q_proj, module.q_norm), (module.k_proj, module.k_norm)):
        heads = textbook.heads(projection(x), 4)
        size = heads.square().mean(-1, keepdim=True).add(1e-5).sqrt()
        if kind == "l2":
            size = heads.norm(dim=-1, keepdim=True)
        heads = heads / size * (norm.weight if kind == "rms" else 1.0)
        normed.append(module.xpos(heads))
    weights = (normed[0] @ normed[1].mT * 3.0).softmax(-1).transpose(0, 1)
    torch.testing.assert_close(torch.as_tensor(module(x, x, x)[1]), weights, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_good_as_its_inputs(dtype: torch.dtype) -> None:
    module, x = make(self_attention=True, subln=True), tokens(33)
    expected, expected_weights = module(x, x, x, is_causal=True)
    low = copy.deepcopy(module).to(dtype)
    out, weights = low(*(x.to(dtype),) * 3, is_causal=True)
    assert out.dtype == weights.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=16 * eps)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=0, atol=4 * eps)


@pytest.mark.parametrize("qk_norm", [None, "rms", "l2"])
def test_autocast(qk_norm: Any) -> None:
    module = make(
        self_attention=True, subln=True, qk_norm=qk_norm, dtype=torch.float32,
        position=RotaryEmbedding(4),
    )  # fmt: skip
    x = tokens(T, dtype=torch.float32)
    expected, _ = module(x, x, x, is_causal=True)
    mask = torch.zeros(T, T).masked_fill(~textbook.causal(T, T), float("-inf"))
    state: dict[str, Any] = {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [
            module(x, x, x, is_causal=True)[0],
            module(x, x, x, attn_mask=mask)[0],
            torch.cat([module(t, t, t, state)[0] for t in x.split(1, dim=1)], 1),
        ]
    for out in outs:
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)
    assert state["prev_key"].dtype == torch.bfloat16


def test_unbatched_equals_a_batch_of_one() -> None:
    args = {"multiway": True}
    module = make(args=args, self_attention=True, position=RotaryEmbedding(4))
    x = tokens(T, batch=1)
    padding = torch.tensor([[False, True, False, False, True]])
    mask, ways = torch.randn(H, T, T, dtype=torch.float64), torch.tensor([[0, 1, 1, 0, 1]])
    positions = torch.tensor([3, 1, 4, 1, 5])
    options = {"attn_mask": mask, "rel_pos": mask, "is_causal": True, "positions": positions}
    expected = module(x, x, x, None, padding, split_position=ways, **options)
    found = module(*(x[0],) * 3, None, padding[0], split_position=ways[0], **options)
    assert found[0].shape == (T, E)
    assert found[1].shape == (H, T, T)
    check_same((found[0][None], found[1][:, None]), expected)
    mean = module(*(x[0],) * 3, need_weights="mean")[1]
    torch.testing.assert_close(mean, module(x, x, x)[1].mean(0)[0], **EXACT)
    state: dict[str, Any] = {}
    for t in range(T):
        module(*(x[0, t : t + 1],) * 3, state)
    assert state["prev_key"].shape == (1, H, T, 4)


class _Doubled(MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return 2.0 * out, weights


@pytest.mark.parametrize("dim", [2, 3])
def test_forward_of_a_subclass_runs_once(dim: int) -> None:
    module, x = _Doubled(None, E, H), torch.randn(1, T, E)
    plain = MultiheadAttention(None, E, H)
    plain.load_state_dict(module.state_dict())
    x = x if dim == 3 else x[0]
    torch.testing.assert_close(module(x, x, x)[0], 2.0 * plain(x, x, x)[0])


def test_every_way_of_asking_for_weights_agrees() -> None:
    module, x = make(self_attention=True), tokens(T)
    found = {
        mode: module(x, x, x, is_causal=True, need_weights=mode)
        for mode in ("lazy", True, False, "mean", None)
    }
    for out, _ in found.values():
        torch.testing.assert_close(out, found["lazy"][0], **EXACT)
    dense = found[True][1]
    assert dense.shape == (H, B, T, T)
    torch.testing.assert_close(dense.sum(-1), torch.ones(H, B, T, dtype=torch.float64), **EXACT)
    for mode in ("lazy", None):
        torch.testing.assert_close(torch.as_tensor(found[mode][1]), dense, **EXACT)
    torch.testing.assert_close(found["mean"][1], dense.mean(0), **EXACT)
    assert found[False][1] is None


def test_constructor_decides_about_weights_and_a_call_overrides() -> None:
    x = tokens(T)
    for choice in (False, "mean", True, "lazy"):
        module = make(need_weights=choice)
        weights = module(x, x, x)[1]
        assert (weights is None) == (choice is False)
        assert weights is None or weights.shape == ((B, T, T) if choice == "mean" else (H, B, T, T))
        assert module(x, x, x, need_weights=False)[1] is None


def test_weights_are_those_before_dropout() -> None:
    module, x = make(dropout=0.5), tokens(64)
    expected = module(x, x, x)[1]
    torch.testing.assert_close(
        torch.as_tensor(module.train()(x, x, x)[1]), torch.as_tensor(expected), **EXACT
    )


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    module, x = make(dropout=0.5), tokens(12)
    expected, _ = make_like(module, dropout=0.0)(x, x, x)
    torch.testing.assert_close(module(x, x, x)[0], expected, **EXACT)
    module.train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(module(x, x, x)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    # Every sequence of a batch draws its own: their mean is the output without dropout.
    many = x[:1].expand(400, -1, -1)
    mean = module(many, many, many)[0].mean(0)
    torch.testing.assert_close(mean, expected[0], rtol=0, atol=0.1)


def make_like(module: MultiheadAttention, **options: Any) -> MultiheadAttention:
    other = make(**options)
    other.load_state_dict(module.state_dict())
    return other


def test_no_argument_is_written_to() -> None:
    module = make(num_heads=1, self_attention=True)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(module, name, nn.Identity())
    x = tokens(T)
    arguments = {
        "attn_mask": torch.randn(T, T, dtype=torch.float64),
        "key_padding_mask": torch.zeros(B, T, dtype=torch.bool),
        "rel_pos": torch.randn(1, T, T, dtype=torch.float64),
    }
    before = copy.deepcopy((x, arguments))
    module(x, x, x, **arguments)
    assert torch.equal(before[0], x)
    for name, tensor in arguments.items():
        assert torch.equal(before[1][name], tensor)


def test_projection_whose_backward_needs_its_output() -> None:
    module = make(num_heads=1)
    module.q_proj = nn.Sequential(nn.Linear(E, E, dtype=torch.float64), nn.Sigmoid())
    x = tokens(T)
    module(x, x, x)[0].sum().backward()
    assert module.q_proj[0].weight.grad.isfinite().all()


def test_projections_may_be_wrapped() -> None:
    """Hooks and wrappers, such as LoRA's, see the tokens: no projection is passed by."""
    module, x = make(), tokens(T)
    seen = []
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        module.get_submodule(name).register_forward_hook(
            lambda part, inputs, output, name=name: seen.append(name)
        )
    module(x, x, x)
    assert sorted(seen) == ["k_proj", "out_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("args", [None, {"multiway": True}, {"multiway": 3}], ids=str)
def test_constructor_and_reset_draw_the_documented_parameters(args: Any) -> None:
    module = MultiheadAttention(args, 256, 4, self_attention=True, subln=True)
    before = {name: p.clone() for name, p in module.named_parameters()}
    for attempt in range(2):
        for name, parameter in module.named_parameters():
            if name.startswith("inner_attn_ln"):
                assert torch.equal(parameter, torch.full_like(parameter, "weight" in name))
            elif name.endswith("weight"):
                gain = 1.0 if name.startswith("out_proj") else 0.5**0.5
                bound = gain * (6 / 512) ** 0.5
                assert parameter.abs().max() <= bound
                assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
            elif name.startswith("out_proj"):
                assert not parameter.any()
        if attempt == 0:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.fill_(7.0)
            module.reset_parameters()
    drawn = [n for n, p in module.named_parameters() if p.dim() == 2]
    assert all(not torch.equal(before[n], module.get_parameter(n)) for n in drawn)
    for first, second in itertools.combinations(drawn, 2):
        assert not torch.equal(module.get_parameter(first), module.get_parameter(second))


def test_reset_after_construction_on_meta() -> None:
    args = {"multiway": True, "xpos_rel_pos": True}
    options = {"self_attention": True, "subln": True, "qk_norm": "rms"}
    module = MultiheadAttention(args, E, H, **options, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    x = tokens(T, dtype=torch.float32)
    assert module(x, x, x)[0].isfinite().all()
    fresh = MultiheadAttention(args, E, H, **options)
    assert torch.equal(module.state_dict()["xpos.scale"], fresh.state_dict()["xpos.scale"])


def test_copies_and_saved_modules_compute_the_same() -> None:
    args = {"multiway": True, "xpos_rel_pos": True}
    module, x = make(args=args, self_attention=True, subln=True), tokens(T)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        check_same(other(x, x, x, split_position=2), module(x, x, x, split_position=2))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of its own kernel
def test_functional_call_and_per_sample_gradients() -> None:
    module, x = make(self_attention=True), tokens(T)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        call = torch.func.functional_call
        out, _ = call(module, parameters, (sample[None],) * 3, {"need_weights": False})
        return out.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for b in range(B):
        expected = torch.autograd.grad(loss(parameters, x[b]), list(parameters.values()))
        for gradient, name in zip(expected, parameters, strict=True):
            torch.testing.assert_close(found[name][b], gradient, rtol=0, atol=1e-10)


def test_print_shows_what_was_asked_for() -> None:
    text = repr(make(num_kv_heads=2))
    assert "embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, dropout=0.0" in text
