"""ONNX: exported by ``torch.onnx.export(dynamo=True)``, run in onnxruntime, equal."""

from typing import Any

import onnxruntime
import pytest
import torch
from torch.export import Dim

from tests.ecosystem.layers import Layer, padding, tokens
from zeta.nn import RotaryEmbedding

LAYERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "xPos, sub-LN, causal": (
        False,
        {"args": {"xpos_rel_pos": True}, "subln": True, "causal": True, "need_weights": False},
    ),
    "T5, causal, padding, weights": (True, {"biased": True, "causal": True, "weights": True}),
    "grouped, rotary, window": (
        True,
        {"num_kv_heads": 2, "position": RotaryEmbedding(8), "window": 3, "need_weights": False},
    ),
}


# torch's exporter meets a deprecated class of torch.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
# Both inputs have the same batch and length.
@pytest.mark.filterwarnings("ignore:# The axis name. (batch|length) will not be used")
@pytest.mark.slow
@pytest.mark.parametrize(("padded", "options"), LAYERS.values(), ids=LAYERS)
def test_onnxruntime_computes_the_same(padded: bool, options: dict[str, Any]) -> None:
    layer = Layer(**options).eval()
    sizes = {0: Dim("batch", min=1), 1: Dim("length", min=1, max=4096)}
    inputs = (tokens(), padding()) if padded else (tokens(),)
    program = torch.onnx.export(
        layer, inputs, dynamo=True, dynamic_shapes=(sizes,) * len(inputs), verbose=False
    )
    assert program is not None
    model = program.model_proto
    # Nothing but ONNX's own operators: any runtime can run it.
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [found.name for found in session.get_inputs()]
    # The first sequence of a padded batch has nothing to see.
    for batch, length in ((3, 9), (1, 1), (5, 140)):
        x = tokens(batch, length)
        inputs = (x, padding(batch, length)) if padded else (x,)
        found = session.run(
            None, {name: given.numpy() for name, given in zip(names, inputs, strict=True)}
        )
        outputs = layer(*inputs)
        expected = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(got), wanted.detach().clone(), rtol=1e-4, atol=1e-5
            )
