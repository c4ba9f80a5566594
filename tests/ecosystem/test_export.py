"""``torch.export``: programs for any batch and length, of torch's own operators alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import zeta
from tests.ecosystem.layers import EMBED, HEADS, Layer, padding, tokens
from zeta import masks
from zeta.nn import MultiheadAttention, RelativePositionBias, RotaryEmbedding

LAYERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain, weights averaged": (False, {"need_weights": "mean", "weights": True}),
    "causal, multiway": (False, {"args": {"multiway": True}, "causal": True}),
    "T5, causal, padding, weights": (True, {"biased": True, "causal": True, "weights": True}),
    "padding, no weights": (True, {"need_weights": False}),
    "xPos, sub-LN": (False, {"args": {"xpos_rel_pos": True}, "subln": True, "causal": True}),
    "grouped, rotary, window": (
        True,
        {"num_kv_heads": 2, "position": RotaryEmbedding(8), "window": 3, "qk_norm": "rms"},
    ),
}
SIZES = [(3, 9), (2, 17), (1, 1), (5, 150)]


def exported(layer: nn.Module, padded: bool) -> ExportedProgram:
    sizes = {0: Dim("batch", min=1), 1: Dim("length", min=1, max=4096)}
    inputs = (tokens(), padding()) if padded else (tokens(),)
    return torch.export.export(layer, inputs, dynamic_shapes=(sizes,) * len(inputs))


def compare(program: nn.Module, layer: nn.Module, padded: bool) -> None:
    for batch, length in SIZES:
        x = tokens(batch, length)
        inputs = (x, padding(batch, length)) if padded else (x,)
        torch.testing.assert_close(program(*inputs), layer(*inputs), rtol=1e-5, atol=1e-5)


def operators(program: ExportedProgram) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


# Torch 2.11 warns of its own way to read a file.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize(("padded", "options"), LAYERS.values(), ids=LAYERS)
def test_a_program_for_all_sizes(padded: bool, options: dict[str, Any], tmp_path: Path) -> None:
    layer = Layer(**options).eval()
    program = exported(layer, padded)
    compare(program.module(), layer, padded)
    assert not [name for name in operators(program) if "zeta" in name]
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    compare(loaded.module(), layer, padded)


def test_a_saved_program_needs_no_zeta(tmp_path: Path) -> None:
    layer = Layer(biased=True, causal=True).eval()
    torch.export.save(exported(layer, True), tmp_path / "layer.pt2")
    x, hidden = tokens(2, 12), padding(2, 12)
    torch.save((x, hidden, layer(x, hidden).detach()), tmp_path / "expected.pt")
    check_elsewhere(tmp_path, 'import sys; sys.modules["zeta"] = None')


def check_elsewhere(folder: Path, first: str) -> None:
    """Loads and runs a program in a fresh process, after a line of its own."""
    code = f"""
{first}
import torch
program = torch.export.load("layer.pt2").module()
*inputs, expected = torch.load("expected.pt")
torch.testing.assert_close(program(*inputs).detach(), expected)
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.stdout == "equal\n", done.stderr


class Named(nn.Module):
    """Attention by a backend that is named."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return zeta.attention(x, x, x, backend=self.backend)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_a_program_of_a_named_backend_asks_for_its_operators(backend: str, tmp_path: Path) -> None:
    x, module = torch.randn(1, 2, 9, 16), Named(backend)
    reasons = zeta.explain(x, x, x).reasons[backend]
    if reasons:
        pytest.skip("; ".join(reasons))
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "layer.pt2")
    torch.save((x, module(x)), tmp_path / "expected.pt")
    check_elsewhere(tmp_path, f"import zeta.ops.backends.{backend}.operators")


def test_a_program_for_training_has_its_dropout_and_gradients() -> None:
    layer = Layer(dropout=0.3, biased=True, causal=True)
    program = exported(layer, True).module()
    x, hidden = tokens(2, 17), padding(2, 17)
    results = []
    for module in (program, layer):
        torch.manual_seed(2)
        out = module(x, hidden)
        found = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        names = [name for name, _ in module.named_parameters()]
        results.append((out.detach(), dict(zip(names, found, strict=True))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not torch.equal(results[0][0], layer.eval()(x, hidden))


class Step(nn.Module):
    """A step of decoding; the cache comes in and goes out as tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiheadAttention(
            None, EMBED, HEADS, self_attention=True, need_weights=False
        )
        self.bias = RelativePositionBias(False, n_heads=HEADS)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = {"prev_key": key, "prev_value": value}
        out, _ = self.attention(x, x, x, state, rel_pos=self.bias, is_causal=True)
        return out, state["prev_key"], state["prev_value"]


@torch.no_grad()
def test_a_step_of_decoding() -> None:
    torch.manual_seed(0)
    step = Step().eval()
    x = tokens(2, 12)
    expected, _ = step.attention(x, x, x, rel_pos=step.bias, is_causal=True)
    state: dict[str, Tensor] = {}
    step.attention(x[:, :4], x[:, :4], x[:, :4], state, is_causal=True)
    # Contiguous, as those that come out of the step are; the dict's are views of a larger memory.
    cached = [state[name].contiguous() for name in ("prev_key", "prev_value")]
    past = {2: Dim("past", min=1, max=4096)}
    program = torch.export.export(
        step, (x[:, 4:5], *cached), dynamic_shapes=(None, past, past)
    ).module()
    for position in range(4, 12):
        out, *cached = program(x[:, position : position + 1], *cached)
        torch.testing.assert_close(out, expected[:, position : position + 1])


class Explained(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, query: Tensor) -> Tensor:
        self.explanation = str(zeta.explain(query, query, query, **self.arguments))
        return zeta.attention(query, query, query, **self.arguments)


def test_explain_says_what_a_program_is_made_of() -> None:
    query = torch.randn(1, 2, 6, 8)
    causal = Explained(mask=masks.Causal())
    torch.export.export(causal, (query,))
    assert causal.explanation.startswith("sdpa runs")
    windowed = Explained(mask=masks.SlidingWindow(3))
    program = torch.export.export(windowed, (query,))
    assert windowed.explanation.startswith("reference runs")
    assert (
        "sdpa: the runtimes of exported programs do not agree on a row whose keys are all hidden"
        in windowed.explanation
    )
    assert "chunked: can, but is asked later" in windowed.explanation
    torch.testing.assert_close(program.module()(query), windowed(query))
    # Outside of an export it is another.
    assert not windowed.explanation.startswith("reference runs")


def test_a_named_backend_is_kept() -> None:
    query = torch.randn(1, 2, 6, 8)
    program = torch.export.export(Explained(backend="chunked"), (query,))
    assert "zeta.chunked_attention.default" in operators(program)
