"""Which tokens go which way, through networks and through attention."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeta.nn import (
    MultiheadAttention,
    MultiwayEmbedding,
    MultiwayNetwork,
    MultiwayWrapper,
    set_split_position,
)

B, T, E = 3, 6, 16
EXACT = {"rtol": 0.0, "atol": 1e-12}


def network(num_ways: int = 2) -> MultiwayNetwork:
    return MultiwayNetwork(nn.Linear(E, 4, dtype=torch.float64), num_ways=num_ways)


def attention(multiway: int | bool = True, **options: Any) -> MultiheadAttention:
    options = {"self_attention": True, "subln": True, **options}
    return MultiheadAttention({"multiway": multiway}, E, 4, dtype=torch.float64, **options)


def tokens(length: int = T) -> Tensor:
    return torch.randn(B, length, E, dtype=torch.float64)


def by_hand(module: nn.Module, x: Tensor, ways: Tensor) -> Tensor:
    """Each token of ``(B, T)`` through its way, one by one."""
    rows = []
    for sample, ids in zip(x, ways.expand(x.shape[:2]), strict=True):
        outs = [
            module.get_submodule("ABCDEF"[way])(token)
            for token, way in zip(sample, ids.tolist(), strict=True)
        ]
        rows.append(torch.stack(outs))
    return torch.stack(rows)


def ways_of_split(split: int, length: int = T, first: int = 0) -> Tensor:
    position = torch.arange(first, first + length)
    return torch.zeros_like(position) if split == -1 else (position >= split).long()


@pytest.mark.parametrize("split", [-1, 0, 1, 3, T, T + 5])
def test_split_position_of_the_module_and_of_the_call(split: int) -> None:
    module, x = network(), tokens()
    expected = by_hand(module, x, ways_of_split(split))
    torch.testing.assert_close(module(x, split_position=split), expected, **EXACT)
    torch.testing.assert_close(module(x, split_position=torch.tensor(split)), expected, **EXACT)
    module.apply(set_split_position(split))
    assert module.split_position == split
    torch.testing.assert_close(module(x), expected, **EXACT)


def test_one_split_a_sequence_and_one_way_a_token() -> None:
    module, x = network(num_ways=3), tokens()
    splits = torch.tensor([2, -1, 0])
    ways = torch.stack([ways_of_split(s) for s in splits.tolist()])
    torch.testing.assert_close(module(x, split_position=splits), by_hand(module, x, ways), **EXACT)
    ways = torch.randint(0, 3, (B, T))
    torch.testing.assert_close(module(x, split_position=ways), by_hand(module, x, ways), **EXACT)
    module.split_position = ways
    torch.testing.assert_close(module(x), by_hand(module, x, ways), **EXACT)


@pytest.mark.parametrize("first", [0, 2, 4, 9])
def test_split_is_a_position_also_of_later_tokens(first: int) -> None:
    module, x = network(), tokens()
    expected = by_hand(module, x, ways_of_split(4, first=first))
    for split in (4, torch.tensor(4), torch.tensor([4] * B)):
        found = module(x, split_position=split, token_positions=first)
        torch.testing.assert_close(found, expected, **EXACT)
    positions = torch.arange(first, first + T).expand(B, T)
    found = module(x, split_position=4, token_positions=positions)
    torch.testing.assert_close(found, expected, **EXACT)


def test_tokens_along_another_dimension() -> None:
    module = MultiwayNetwork(nn.Linear(E, 4, dtype=torch.float64), dim=0)
    x = tokens()[0]
    expected = torch.cat([module.A(x[:2]), module.B(x[2:])])
    for split in (2, torch.tensor(2)):
        torch.testing.assert_close(module(x, split_position=split), expected, **EXACT)
    with pytest.raises(ValueError, match="needs dim=1; got dim=0"):
        module(x, split_position=torch.ones(T, E, dtype=torch.long))


def test_copies_are_drawn_anew() -> None:
    module = network(num_ways=4)
    weights = [way.weight for way in module.children()]
    assert [name for name, _ in module.named_children()] == ["A", "B", "C", "D"]
    for i, weight in enumerate(weights):
        assert all(not torch.equal(weight, other) for other in weights[:i])


def test_copies_of_a_module_made_of_parts_are_drawn_anew() -> None:
    module = MultiwayNetwork(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert not torch.equal(module.A[2].weight, module.B[2].weight)


def test_a_module_that_draws_for_its_parts_draws_last_in_a_copy() -> None:
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(E, E)

        def reset_parameters(self) -> None:
            nn.init.zeros_(self.inner.weight)

    assert not MultiwayNetwork(Zeros()).B.inner.weight.any()


def test_parameters_that_were_assigned_may_be_on_another_device() -> None:
    with torch.device("meta"):
        module = attention()
    module.load_state_dict(attention().state_dict(), assign=True)
    x = tokens()
    assert module(x, x, x, positions=torch.arange(T))[0].isfinite().all()


def test_wrapper_asks_the_configuration() -> None:
    linear = nn.Linear(E, E)
    assert MultiwayWrapper(None, linear) is linear
    assert MultiwayWrapper({"multiway": False}, linear) is linear
    wrapped = MultiwayWrapper({"multiway": True}, linear, dim=0)
    assert isinstance(wrapped, MultiwayNetwork)
    assert wrapped.A is linear
    assert wrapped.dim == 0
    assert len(list(MultiwayWrapper({"multiway": 3}, linear).children())) == 3


def test_embeddings_of_different_vocabularies() -> None:
    module = MultiwayEmbedding([nn.Embedding(3, 4), nn.Embedding(100, 4)])
    x = torch.tensor([[0, 2, 99, 50]])
    expected = torch.cat([module.A(x[:, :2]), module.B(x[:, 2:])], 1)
    for split in (2, torch.tensor(2), torch.tensor([2]), torch.tensor([[0, 0, 1, 1]])):
        assert torch.equal(module(x, split_position=split), expected)


def test_keyword_arguments_reach_every_way() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor, *, shift: float) -> Tensor:
            return super().forward(x) + shift

    module = MultiwayNetwork(Shifted(E, 4, dtype=torch.float64))
    x = tokens()
    module.split_position = 2
    difference = module(x, shift=1.0) - module(x, shift=0.0)
    torch.testing.assert_close(difference, torch.ones_like(difference), **EXACT)


@pytest.mark.parametrize(
    "split", [-1, 0, 3, T, torch.tensor(-1), torch.zeros(B, T, dtype=torch.long)]
)
@pytest.mark.parametrize("num_ways", [2, 3])
def test_way_without_tokens_gets_gradients_of_zero(split: Any, num_ways: int) -> None:
    module, x = attention(num_ways), tokens()
    module(x, x, x, split_position=split)[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
    unused = [module.out_proj.B] if isinstance(split, Tensor) or split in (-1, T) else []
    unused += [module.out_proj.A] if isinstance(split, int) and split == 0 else []
    unused += [module.out_proj.C] if num_ways == 3 else []
    for way in unused:
        assert not way.weight.grad.any()
        assert not way.bias.grad.any()


def test_attention_sends_each_token_through_its_own_parameters() -> None:
    module, x = attention(3), tokens()
    ways = torch.randint(0, 3, (B, T))
    q, k, v = (
        by_hand(p, x, ways).unflatten(-1, (4, -1)).transpose(1, 2)
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    weights = (q @ k.mT / 2.0).softmax(-1)
    out = by_hand(module.inner_attn_ln, (weights @ v).transpose(1, 2).flatten(2), ways)
    found = module(x, x, x, split_position=ways)
    torch.testing.assert_close(found[0], by_hand(module.out_proj, out, ways), **EXACT)
    torch.testing.assert_close(torch.as_tensor(found[1]), weights.transpose(0, 1), **EXACT)


@pytest.mark.parametrize("split", [0, 1, 3, T, -1])
def test_every_form_of_a_split_agrees_in_attention(split: int) -> None:
    module, x = attention(), tokens()
    ways = ways_of_split(split).expand(B, T)
    expected = module(x, x, x, split_position=ways)[0]
    forms: list[Any] = [
        split,
        torch.tensor(split),
        torch.tensor([split] * B),
        ways.bool(),
        ways.int(),
    ]
    for form in forms:
        torch.testing.assert_close(module(x, x, x, split_position=form)[0], expected, **EXACT)
    model = nn.ModuleList([module])
    model.apply(set_split_position(split))
    torch.testing.assert_close(module(x, x, x)[0], expected, **EXACT)


@pytest.mark.parametrize("split", [-1, 0, 1, 3, 4, T + 3])
@pytest.mark.parametrize("sizes", [[1] * T, [4, 1, 1], [2, 3, 1]], ids=str)
def test_decoding_past_the_split(split: int, sizes: list[int]) -> None:
    module, x = attention().eval(), tokens()
    expected = module(x, x, x, is_causal=True, split_position=split)[0]
    for form in (split, torch.tensor([split] * B)):
        state: dict[str, Any] = {}
        outs = [
            module(part, part, part, state, is_causal=True, split_position=form)[0]
            for part in x.split(sizes, dim=1)
        ]
        torch.testing.assert_close(torch.cat(outs, 1), expected, **EXACT)
    module.apply(set_split_position(split))
    state = {}
    outs = [module(p, p, p, state, is_causal=True)[0] for p in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(outs, 1), expected, **EXACT)


def test_decoding_with_a_way_a_token() -> None:
    module, x = attention(3).eval(), tokens()
    ways = torch.randint(0, 3, (B, T))
    expected = module(x, x, x, is_causal=True, split_position=ways)[0]
    state: dict[str, Any] = {}
    outs = [
        module(*(x[:, t : t + 1],) * 3, state, split_position=ways[:, t : t + 1])[0]
        for t in range(T)
    ]
    torch.testing.assert_close(torch.cat(outs, 1), expected, **EXACT)


def test_cross_attention_splits_queries_and_keys() -> None:
    module = attention(self_attention=False, encoder_decoder_attention=True, subln=False).eval()
    query, source = tokens(), tokens(9)
    ways, source_ways = torch.randint(0, 2, (B, T)), torch.randint(0, 2, (B, 9))
    found = module(query, source, source, split_position=(ways, source_ways))[0]
    q = by_hand(module.q_proj, query, ways)
    k, v = (by_hand(p, source, source_ways) for p in (module.k_proj, module.v_proj))
    q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
    out = ((q @ k.mT / 2.0).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, by_hand(module.out_proj, out, ways), **EXACT)


def test_cross_attention_decodes_past_the_split() -> None:
    module = attention(self_attention=False, encoder_decoder_attention=True, subln=False).eval()
    query, source = tokens(), tokens(9)
    expected = module(query, source, source, split_position=3)[0]
    state: dict[str, Any] = {}
    outs = []
    for part in query.split([2, 1, 2, 1], dim=1):
        keys = (source, source) if not outs else (None, None)
        outs.append(module(part, *keys, state, split_position=3)[0])
    torch.testing.assert_close(torch.cat(outs, 1), expected, **EXACT)


def test_cross_attention_goes_by_the_positions_that_are_given() -> None:
    module = attention(self_attention=False, encoder_decoder_attention=True, subln=False).eval()
    query, source = tokens(), tokens(9)
    positions = torch.arange(T) + torch.tensor([[0], [-2], [1]])
    state: dict[str, Any] = {}
    outs = []
    for part, at in zip(query.split([2, 1, 3], dim=1), positions.split([2, 1, 3], 1), strict=True):
        keys = (source, source) if not outs else (None, None)
        outs.append(module(part, *keys, state, split_position=(3, -1), positions=at)[0])
    ways = (positions >= 3).long()
    expected = module(query, source, source, split_position=(ways, -1))[0]
    torch.testing.assert_close(torch.cat(outs, 1), expected, **EXACT)


def test_a_dimension_may_count_from_the_end() -> None:
    module, x = MultiwayNetwork(nn.Linear(E, E), dim=-2).double(), tokens()
    for split in (3, torch.tensor(3)):
        found = module(x, split_position=split)
        torch.testing.assert_close(found[:, :3], module.A(x[:, :3]), **EXACT)
        torch.testing.assert_close(found[:, 3:], module.B(x[:, 3:]), **EXACT)
    of_each = module(x, split_position=torch.tensor([0, 1, 1]))
    torch.testing.assert_close(of_each[0], module.B(x[0]), **EXACT)


def test_positions_say_where_the_split_is() -> None:
    """Two sequences, the second shifted to the right by padding, split at the same token."""
    module, x = attention(), tokens()[:2]
    positions = torch.stack([torch.arange(T), torch.arange(T) - 2])
    found = module(x, x, x, split_position=3, positions=positions)[0]
    ways = (positions >= 3).long()
    expected = module(x, x, x, split_position=ways)[0]
    torch.testing.assert_close(found, expected, **EXACT)


def test_split_is_not_in_the_state_dict_and_survives_moves_and_copies() -> None:
    module = attention()
    module.apply(set_split_position(2))
    assert not any("split" in key for key in module.state_dict())
    for other in (copy.deepcopy(module), copy.deepcopy(module).to(torch.float32), module):
        assert other.q_proj.split_position == 2
    empty = copy.deepcopy(module).to_empty(device="meta").to_empty(device="cpu")
    assert empty.q_proj.split_position == 2
    assert int(empty.q_proj._split_tensor) == 2
    assert module.to("meta").q_proj._split_tensor.is_meta


@pytest.mark.parametrize(
    ("split", "error", "message"),
    [
        (-2, ValueError, "position, or -1 for all on way A; got -2"),
        (2.0, TypeError, "int or an integer tensor; got float"),
        (True, TypeError, "int or an integer tensor; got bool"),
        (torch.tensor(1.0), TypeError, "integer tensor; got torch.float32"),
        (torch.zeros(B, T, 1, dtype=torch.long), ValueError, r"0-d, \(batch,\) or"),
        (
            torch.zeros(B + 1, dtype=torch.long),
            ValueError,
            "one entry for each of 3 sequences; got 4",
        ),
        (torch.zeros(B, T + 1, dtype=torch.long), ValueError, r"way of each of \(3, 6\) tokens"),
        (torch.full((B, T), 2), ValueError, "ways 0 to 1; got 2 to 2"),
        (torch.full((B, T), -1), ValueError, "ways 0 to 1; got -1 to -1"),
    ],
)
def test_wrong_split_is_refused(split: Any, error: type[Exception], message: str) -> None:
    x = tokens()
    with pytest.raises(error, match=message):
        network()(x, split_position=split)
    with pytest.raises(error, match=message):
        attention()(x, x, x, split_position=split)


def test_wrong_split_is_refused_when_it_is_set() -> None:
    with pytest.raises(ValueError, match="got -3"):
        network().apply(set_split_position(-3))


def test_wrong_number_of_ways_is_refused() -> None:
    with pytest.raises(ValueError, match="2 to 26 ways; got 1"):
        MultiwayEmbedding([nn.Embedding(3, 4)])
    with pytest.raises(ValueError, match="2 to 26 ways; got 27"):
        network(27)


def test_split_without_multiway_is_refused() -> None:
    module, x = MultiheadAttention(None, E, 4), tokens().float()
    with pytest.raises(ValueError, match=r"split_position was given, but .* no args.multiway"):
        module(x, x, x, split_position=3)


@pytest.mark.distributed
def test_distributed_data_parallel_finds_no_unused_parameter(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        module, x = nn.parallel.DistributedDataParallel(attention()), tokens()
        for split in (-1, 0, 3):
            module.apply(set_split_position(split))
            module(x, x, x)[0].sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiwayNetwork(nn.Linear(2, 2), dim=1.0), "dim must be an integer; got float"),
        (lambda: MultiwayNetwork(nn.Linear(2, 2), num_ways="2"), "num_ways must be an integer"),
        (lambda: MultiwayNetwork(torch.relu), "module must be a module; got builtin_function"),
        (lambda: MultiwayEmbedding(nn.Embedding(3, 2)), "modules must be a sequence of modules"),
        (lambda: MultiwayEmbedding([nn.Embedding(3, 2), None]), "a way must be a module; got None"),
        (lambda: MultiwayWrapper(nn.Linear(2, 2), None), "module must be a module; got NoneType"),
    ],
)
def test_what_is_no_module_is_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("shape", [(B,), (B, T)], ids=str)
def test_split_on_another_device_is_refused(shape: tuple[int, ...]) -> None:
    split = torch.zeros(shape, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="split_position must be on the tokens' device cpu"):
        network()(tokens(), split_position=split)
