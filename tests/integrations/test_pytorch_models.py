"""torch's own layers, and a detector, with their attention computed by Zeta."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeta
from zeta.integrations import pytorch
from zeta.integrations.pytorch import MultiheadAttention, adopt

BATCH, TARGET, SOURCE, EMBED, HEADS = 3, 5, 7, 8, 2
LATER = torch.ones(TARGET, TARGET).triu(1).bool()
PADDING = torch.arange(SOURCE) >= torch.tensor([[7], [4], [1]])
TARGET_PADDING = PADDING[:, :TARGET]

pytestmark = [
    # What torch says of its own layers and nested tensors.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each attention that Zeta computes."""
    seen: list[int] = []
    output_of = pytorch.output_of

    def counted(call: Any) -> Tensor:
        seen.append(1)
        return output_of(call)

    monkeypatch.setattr(pytorch, "output_of", counted)
    return seen


def swapped(model: nn.Module) -> nn.Module:
    """A copy of a model, its attention Zeta's."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if type(module) is nn.MultiheadAttention:
            adopt(module)
    return model


def tokens(length: int, batch_first: bool) -> Tensor:
    shape = (BATCH, length, EMBED) if batch_first else (length, BATCH, EMBED)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(model: nn.Module, inputs: list[Tensor], **masks: Any) -> None:
    """The same output and gradients as with torch's attention."""
    ours = swapped(model)
    results = []
    for module in (ours, model):
        out = module(*inputs, **masks)
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        leaves += list(module.parameters())
        gradients = torch.autograd.grad((out * out.cos()).sum(), leaves, allow_unused=True)
        results.append([out, *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


OPTIONS = {"dim_feedforward": 12, "dropout": 0.0, "dtype": torch.float64}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"src_mask": LATER},
        {"src_mask": LATER, "is_causal": True},
        {"src_key_padding_mask": TARGET_PADDING},
        {"src_mask": LATER, "src_key_padding_mask": TARGET_PADDING},
    ],
    ids=lambda masks: " ".join(masks) or "plain",
)
def test_encoder_layer(
    masks: dict[str, Any], batch_first: bool, norm_first: bool, calls: list[int]
) -> None:
    layer = nn.TransformerEncoderLayer(
        EMBED, HEADS, batch_first=batch_first, norm_first=norm_first, **OPTIONS
    )
    x = tokens(TARGET, batch_first)
    assert_same(layer, [x], **masks)
    assert len(calls) == 1
    layer.eval()
    assert_same(layer, [x], **masks)
    with torch.no_grad():
        found, expected = swapped(layer)(x, **masks), layer(x, **masks)
    torch.testing.assert_close(found, expected)
    assert len(calls) == 3


@pytest.fixture
def bypasses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one each time torch computes a whole encoder layer by itself."""
    seen: list[int] = []
    fused = torch._transformer_encoder_layer_fwd

    def counted(*arguments: Any) -> Tensor:
        seen.append(1)
        return fused(*arguments)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    return seen


def test_the_layer_does_not_bypass_it(calls: list[int], bypasses: list[int]) -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, batch_first=True).eval()
    x = torch.randn(BATCH, TARGET, EMBED)
    with torch.no_grad():
        layer(x)
        assert (len(calls), len(bypasses)) == (0, 1)
        for model in (swapped(layer), copy.deepcopy(swapped(layer))):
            model(x)
        assert (len(calls), len(bypasses)) == (2, 1)


def test_in_eval_a_query_that_sees_nothing_gets_zeros() -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, batch_first=True).eval()
    x = torch.randn(BATCH, TARGET, EMBED)
    padding = torch.zeros(BATCH, TARGET, dtype=torch.bool)
    padding[1] = True
    with torch.no_grad():
        assert layer(x, src_key_padding_mask=padding)[1].isnan().all()
        out = swapped(layer)(x, src_key_padding_mask=padding)
        assert out.isfinite().all()
        torch.testing.assert_close(out[0], layer(x[:1])[0])


def encoder(**options: Any) -> nn.TransformerEncoder:
    """Two layers whose parameters differ."""
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, **OPTIONS, **options)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(EMBED, dtype=torch.float64))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_normal_(parameter)
    return model


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_encoder(training: bool, batch_first: bool, norm_first: bool, calls: list[int]) -> None:
    model = encoder(batch_first=batch_first, norm_first=norm_first).train(training)
    x = tokens(SOURCE, batch_first)
    later = nn.Transformer.generate_square_subsequent_mask(SOURCE, dtype=torch.float64)
    for masks in ({}, {"src_key_padding_mask": PADDING}, {"mask": later}):
        assert_same(model, [x], **masks)
        with torch.no_grad():
            # With padding, in eval, torch's encoder makes a nested tensor of its input.
            found, expected = swapped(model)(x, **masks), model(x, **masks)
        torch.testing.assert_close(found, expected)
    assert len(calls) == 3 * 2 * 2


def test_encoder_with_an_empty_sequence() -> None:
    model = encoder(batch_first=True).eval()
    x = tokens(SOURCE, True)
    padding = PADDING.clone()
    padding[1] = True
    with torch.no_grad():
        found, expected = (m(x, src_key_padding_mask=padding) for m in (swapped(model), model))
    torch.testing.assert_close(found, expected)


def test_a_float_mask_is_added_where_torchs_fast_path_hides() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    ours = copy.deepcopy(layer)
    zeta.swap(ours)
    x, mask = torch.randn(2, 5, 16), torch.zeros(5, 5)
    mask[:, 3] = 0.5
    added = layer(x, src_mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, src_mask=mask), layer(x, src_mask=mask != 0))
        torch.testing.assert_close(ours(x, src_mask=mask), added)


def test_encoder_with_a_hint_alone_is_causal() -> None:
    model = swapped(encoder(batch_first=True)).eval()
    x = tokens(SOURCE, True)
    later = nn.Transformer.generate_square_subsequent_mask(SOURCE, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x, is_causal=True), model(x, mask=later))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_decoder_layer(
    training: bool, batch_first: bool, norm_first: bool, calls: list[int]
) -> None:
    layer = nn.TransformerDecoderLayer(
        EMBED, HEADS, batch_first=batch_first, norm_first=norm_first, **OPTIONS
    ).train(training)
    inputs = [tokens(TARGET, batch_first), tokens(SOURCE, batch_first)]
    for masks in (
        {},
        {"tgt_mask": LATER, "tgt_is_causal": True},
        {"memory_key_padding_mask": PADDING, "tgt_key_padding_mask": TARGET_PADDING},
    ):
        assert_same(layer, inputs, **masks)
    assert len(calls) == 3 * 2


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(batch_first: bool, norm_first: bool, calls: list[int]) -> None:
    model = nn.Transformer(
        EMBED, HEADS, 1, 1, batch_first=batch_first, norm_first=norm_first, **OPTIONS
    )
    inputs = [tokens(SOURCE, batch_first), tokens(TARGET, batch_first)]
    later = nn.Transformer.generate_square_subsequent_mask(TARGET, dtype=torch.float64)
    masks = {"tgt_mask": later, "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    assert_same(model, inputs, **masks)
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(swapped(model)(*inputs, **masks), model(*inputs, **masks))
    assert len(calls) == 2 * 3


def test_unbatched_layers() -> None:
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, **OPTIONS)
    inputs = [tokens(TARGET, True)[0].detach(), tokens(SOURCE, True)[0].detach()]
    assert_same(layer, inputs, memory_key_padding_mask=PADDING[1])


class Detector(nn.Module):
    """A small detector after Carion et al., DETR, 2020: positions are added to queries and keys."""

    def __init__(self, num_queries: int = 4) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, EMBED))
        self.encoder = nn.MultiheadAttention(EMBED, HEADS)
        self.decoder = nn.MultiheadAttention(EMBED, HEADS)
        self.cross = nn.MultiheadAttention(EMBED, HEADS)
        self.boxes = nn.Linear(EMBED, 4)

    def forward(self, image: Tensor, positions: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes ``(queries, B, 4)``, and where each looked, ``(B, queries, pixels)``."""
        seen = image + positions
        image = image + self.encoder(seen, seen, value=image, key_padding_mask=padding)[0]
        queries = self.queries[:, None].expand(-1, image.shape[1], -1)
        found = torch.zeros_like(queries)
        found = found + self.decoder(queries, queries, value=found)[0]
        read, looked = self.cross(
            query=found + queries, key=image + positions, value=image, key_padding_mask=padding
        )
        return self.boxes(found + read).sigmoid(), looked


def test_detector() -> None:
    model = Detector().double()
    ours = copy.deepcopy(model)
    report = zeta.swap(ours)
    assert [entry.names for entry in report.replaced] == [("encoder",), ("decoder",), ("cross",)]
    image, positions = tokens(SOURCE, False), tokens(SOURCE, False)
    results = []
    for module in (ours, model):
        boxes, looked = module(image, positions, PADDING)
        loss = boxes.square().sum() + looked.square().sum()
        gradients = torch.autograd.grad(loss, [image, positions, *module.parameters()])
        results.append([boxes, looked.clone(), *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_detector_learns_with_dropout() -> None:
    model = Detector()
    for module in (model.encoder, model.decoder, model.cross):
        module.dropout = 0.1
    zeta.swap(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    image, positions = torch.randn(2, SOURCE, BATCH, EMBED).unbind()
    wanted = torch.rand(4, BATCH, 4)
    losses = []
    for _ in range(25):
        boxes, _ = model(image, positions, PADDING)
        loss = (boxes - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_dropout_is_right_on_average() -> None:
    module = MultiheadAttention(EMBED, HEADS, dropout=0.3, batch_first=True)
    x = torch.randn(1, TARGET, EMBED)
    num_draws = 20000
    with torch.no_grad():
        drawn, _ = module(*[x.expand(num_draws, -1, -1)] * 3)
        expected, _ = module.eval()(x, x, x)
    error = drawn.mean(0) - expected[0]
    deviation = drawn.std(0) / num_draws**0.5
    assert (deviation > 0).all()
    assert (error.abs() < 5 * deviation).all()


def nested(*lengths: int, **options: Any) -> Tensor:
    parts = [torch.randn(length, EMBED, dtype=torch.float64) for length in lengths]
    return torch.nested.nested_tensor(parts, **options)


@pytest.mark.parametrize("average", [True, False])
def test_nested_tensors(average: bool) -> None:
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64).eval()
    ours = swapped(theirs)
    x = nested(5, 2, 7)
    with torch.no_grad():
        found, weights = ours(x, x, x, average_attn_weights=average)
        expected, expected_weights = theirs(x, x, x, average_attn_weights=average)
    torch.testing.assert_close(found.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
    assert [part.shape[0] for part in found.unbind()] == [5, 2, 7]
    torch.testing.assert_close(weights.clone(), expected_weights)


def test_nested_tensors_in_training() -> None:
    ours = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    x = nested(5, 2, requires_grad=True)
    out, _ = ours(x, x, x, is_causal=True)
    out.to_padded_tensor(0.0).square().sum().backward()
    for part, gradient, result in zip(x.unbind(), x.grad.unbind(), out.unbind(), strict=True):
        alone = part.detach().requires_grad_()
        expected, _ = ours(alone, alone, alone, is_causal=True)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(gradient, *torch.autograd.grad(expected.square().sum(), alone))


def test_nested_tensors_that_cannot_be() -> None:
    ours = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    x = nested(5, 2)
    with pytest.raises(ValueError, match=r"^a nested tensor must be query, key and value in one"):
        ours(x, nested(5, 2), x)
    with pytest.raises(ValueError, match=r"^attn_mask and key_padding_mask must be None with"):
        ours(x, x, x, attn_mask=torch.zeros(5, 5))
    y = nested(5, 2, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"must have layout torch\.strided; got torch\.jagged"):
        ours(y, y, y)
    wide = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])
    with pytest.raises(ValueError, match=r"^a nested query must hold sequences of 8 features"):
        ours(wide, wide, wide)
    ours.batch_first = False
    with pytest.raises(ValueError, match="the module have batch_first=True"):
        ours(x, x, x)
