"""The module against the textbook: every form of mask and bias, grouped heads, sizes, gradients."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nn import textbook
from zeta import biases, masks
from zeta.nn import ALiBi, MultiheadAttention, RelativePositionBias, RotaryEmbedding

B, H, T, S, E = 3, 4, 5, 7, 16
EXACT = {"rtol": 0.0, "atol": 1e-12}


def make(**options: Any) -> MultiheadAttention:
    """A float64 module in evaluation mode."""
    args = options.pop("args", None)
    sizes = (options.pop("embed_dim", E), options.pop("num_heads", H))
    return MultiheadAttention(args, *sizes, **{"dtype": torch.float64, **options}).eval()


def tokens(length: int, features: int = E, batch: int = B, **options: Any) -> Tensor:
    return torch.randn(batch, length, features, **{"dtype": torch.float64, **options})


def check_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Outputs and weights are equal, and so are the gradients of all that they were made from."""
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    torch.testing.assert_close(torch.as_tensor(found[1]), expected[1], **EXACT)


def check_same_gradients(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], inputs: list[Tensor]
) -> None:
    check_same(found, expected)
    cotangents = [torch.randn_like(t) for t in expected]
    gradients = [torch.autograd.grad(outputs, inputs, cotangents) for outputs in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


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


def dense_masks() -> dict[str, Tensor]:
    """Of each accepted shape, True: hidden. No row is empty."""
    shapes = {
        "T, S": (T, S),
        "B, T, S": (B, T, S),
        "B * H, T, S": (B * H, T, S),
        "1, 1, T, S": (1, 1, T, S),
        "B, 1, T, S": (B, 1, T, S),
        "1, H, T, S": (1, H, T, S),
        "B, H, T, S": (B, H, T, S),
    }
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}
    for mask in found.values():
        mask[..., 3] = False
    return found


def over_scores(tensor: Tensor) -> Tensor:
    """A mask of any accepted shape over ``(B, H, T, S)``."""
    if tensor.dim() == 2:
        return tensor.expand(B, H, T, S)
    if tensor.dim() == 3:
        tensor = tensor[:, None] if tensor.shape[0] == B else tensor.unflatten(0, (B, H))
    return tensor.expand(B, H, T, S)


@pytest.mark.parametrize("name", dense_masks())
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}], ids=["plain", "grouped heads"])
def test_bool_mask_of_every_shape_hides(name: str, options: dict[str, Any]) -> None:
    module, hidden = make(**options), dense_masks()[name]
    query, source = tokens(T), tokens(S)
    out, weights = module(query, source, source, attn_mask=hidden)
    visible = ~over_scores(hidden)
    check_same((out, weights), textbook.attend(module, query, source, source, visible=visible))
    assert not weights.transpose(0, 1)[~visible].any()


@pytest.mark.parametrize("name", dense_masks())
def test_float_mask_of_every_shape_is_added_and_gets_its_gradient(name: str) -> None:
    module = make()
    mask = torch.randn(dense_masks()[name].shape, dtype=torch.float64).requires_grad_()
    query, source = tokens(T), tokens(S)
    expected = textbook.attend(module, query, source, source, bias=over_scores(mask))
    check_same_gradients(module(query, source, source, attn_mask=mask), expected, [mask])


@pytest.mark.parametrize("shape", [(B * H, T, S), (H, T, S), (1, H, T, S), (B, H, T, S)], ids=str)
def test_relative_position_tensor_of_every_shape(shape: tuple[int, ...]) -> None:
    module = make()
    rel_pos = torch.randn(shape, dtype=torch.float64).requires_grad_()
    query, source = tokens(T), tokens(S)
    bias = rel_pos.unflatten(0, (-1, H)) if len(shape) == 3 else rel_pos
    expected = textbook.attend(module, query, source, source, bias=bias)
    check_same_gradients(module(query, source, source, rel_pos=rel_pos), expected, [rel_pos])


def test_padding_mask_hides_and_a_float_one_is_added() -> None:
    module, query, source = make(), tokens(T), tokens(S)
    padding = torch.arange(S) >= torch.tensor([[7], [4], [1]])
    expected = textbook.attend(module, query, source, source, visible=~padding[:, None, None])
    check_same(module(query, source, source, key_padding_mask=padding), expected)
    added = torch.randn(B, S, dtype=torch.float64).requires_grad_()
    expected = textbook.attend(module, query, source, source, bias=added[:, None, None])
    found = module(query, source, source, key_padding_mask=added)
    check_same_gradients(found, expected, [added])


def test_mild_float_padding_mask_does_not_hide() -> None:
    module, x = make(), tokens(T)
    mild = torch.zeros(B, T, dtype=torch.float64)
    mild[:, -1] = -1.0
    _, weights = module(x, x, x, key_padding_mask=mild)
    assert (weights[..., -1] > 0).all()


def test_everything_at_once() -> None:
    module, query, source = make(num_kv_heads=2), tokens(T), tokens(S)
    hidden, added = dense_masks()["B, T, S"], torch.randn(H, T, S, dtype=torch.float64)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 0] = True
    visible = textbook.causal(T, S) & ~hidden[:, None] & ~padding[:, None, None]
    expected = textbook.attend(module, query, source, source, visible=visible, bias=added)
    found = module(
        query, source, source, key_padding_mask=padding, attn_mask=hidden, rel_pos=added,
        is_causal=True,
    )  # fmt: skip
    check_same(found, expected)


@pytest.mark.parametrize("target", [S, T, 1])
def test_causal_flag_works_alone_and_aligns_queries_with_the_last_keys(target: int) -> None:
    module, query, source = make(), tokens(target), tokens(S)
    expected = textbook.attend(module, query, source, source, visible=textbook.causal(target, S))
    check_same(module(query, source, source, is_causal=True), expected)


@pytest.mark.parametrize("window", [1, 3, S, 100])
@pytest.mark.parametrize("target", [S, T, 1])
def test_window(window: int, target: int) -> None:
    module, query, source = make(window=window), tokens(target), tokens(S)
    visible = textbook.causal(target, S).triu(S - target - window + 1)
    expected = textbook.attend(module, query, source, source, visible=visible)
    for is_causal in (False, True):
        check_same(module(query, source, source, is_causal=is_causal), expected)


def test_mask_and_bias_values_are_taken() -> None:
    module, x = make(), tokens(T)
    lengths, slopes = torch.tensor([5, 3, 1]), torch.rand(H, dtype=torch.float64)
    mask = masks.Causal() & masks.Padding(lengths)
    bias = biases.Softcap(2.0) + biases.Alibi(slopes)
    _, weights = module(x, x, x, attn_mask=mask, rel_pos=bias)
    q, k = (textbook.heads(p(x), module.head_dim) for p in (module.q_proj, module.k_proj))
    scores = 2.0 * torch.tanh(q @ k.mT * module.scale / 2.0)
    distance = (torch.arange(T) - torch.arange(T)[:, None]).abs()
    scores = scores - slopes[:, None, None] * distance
    visible = textbook.causal(T, T) & (torch.arange(T) < lengths[:, None, None, None])
    torch.testing.assert_close(
        torch.as_tensor(weights), textbook.softmax(scores, visible).transpose(0, 1), **EXACT
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_bias_module(bidirectional: bool) -> None:
    rel_pos = RelativePositionBias(
        bidirectional, num_buckets=8, max_distance=6, n_heads=H, dtype=torch.float64
    )
    module, x = make(self_attention=True), tokens(12)
    dense = rel_pos(B, 12, 12)
    visible = textbook.causal(12, 12)
    expected = textbook.attend(module, x, x, x, visible=visible, bias=dense.unflatten(0, (B, H)))
    found = module(x, x, x, rel_pos=rel_pos, is_causal=True)
    check_same_gradients(found, expected, list(rel_pos.parameters()))


def test_alibi_module() -> None:
    alibi, module, x = ALiBi(H), make(self_attention=True), tokens(12)
    bias = alibi(B, 12, 12).unflatten(0, (B, H)).double()
    check_same(module(x, x, x, rel_pos=alibi), textbook.attend(module, x, x, x, bias=bias))


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


def test_row_with_every_key_hidden_is_zero_and_poisons_no_gradient() -> None:
    module, x = make(), tokens(T).requires_grad_()
    hidden = torch.zeros(T, T, dtype=torch.bool)
    hidden[2] = True
    as_float = torch.zeros(T, T, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    for mask in (hidden, as_float):
        out, weights = module(x, x, x, attn_mask=mask)
        assert not weights[:, :, 2].any()
        torch.testing.assert_close(out[:, 2], module.out_proj.bias.expand(B, E), **EXACT)
        gradients = torch.autograd.grad(
            out.sum() + weights.square().sum(), [x, *module.parameters()]
        )
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_left_padding_with_a_causal_mask_is_finite_and_right() -> None:
    module, x = make(self_attention=True), tokens(T)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[:, :2] = True
    out, weights = module(x, x, x, key_padding_mask=padding, is_causal=True)
    assert out.isfinite().all()
    assert not weights[:, :, :2].any()
    alone = module(x[:, 2:], x[:, 2:], x[:, 2:], is_causal=True)
    check_same((out[:, 2:], weights[:, :, 2:, 2:]), alone)


def test_sequence_that_is_all_padding_is_zero() -> None:
    module, x = make(), tokens(T)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    out, weights = module(x, x, x, key_padding_mask=padding)
    assert not weights[:, 1].any()
    torch.testing.assert_close(out[1], module.out_proj.bias.expand(T, E), **EXACT)


def test_nan_passes_through_with_and_without_a_mask() -> None:
    module, x = make(), tokens(T)
    x[0, 1, 0] = float("nan")
    for attn_mask in (None, torch.zeros(T, T, dtype=torch.float64)):
        out, _ = module(x, x, x, attn_mask=attn_mask)
        assert out[0].isnan().all()
        assert out[1:].isfinite().all()


def test_mask_that_hides_nothing_changes_nothing() -> None:
    module, x = make(), tokens(T)
    plain = module(x, x, x)
    for mask in (torch.zeros(T, T, dtype=torch.bool), torch.zeros(T, T, dtype=torch.float64)):
        check_same(module(x, x, x, attn_mask=mask), plain)


def test_half_precision_mask_of_minus_infinity() -> None:
    """-1e9 is -inf in float16: a causal mask made so must not give NaN."""
    module = make(dtype=torch.float32).half()
    x = tokens(T, dtype=torch.float32).half()
    mask = (torch.ones(T, T).triu() * -1e9).half()
    mask[torch.ones(T, T).tril(-1) > 0] = 0.0
    out, weights = module(x, x, x, attn_mask=mask)
    assert out.isfinite().all()
    assert not weights[:, :, 0].any()


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
