"""PEFT's LoRA and torchao's weight-only quantisation, on the projections of an attention."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

from tests.ecosystem.layers import Layer, padding, tokens

TARGETS: dict[str, tuple[object, Any]] = {
    "one way": (None, ["q_proj", "v_proj"]),
    "multiway": ({"multiway": True}, r"attention\.(q|v)_proj\.(A|B)"),
}


@pytest.mark.parametrize(("args", "targets"), TARGETS.values(), ids=TARGETS)
def test_lora(args: object, targets: Any) -> None:
    base = Layer(args, biased=True, causal=True, subln=True)
    inputs = tokens(), padding()
    before = base(*inputs).detach()
    names = {name for name, _ in base.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=targets)
    model = peft.get_peft_model(base, config)
    # The second factor begins at zero.
    torch.testing.assert_close(model(*inputs), before, rtol=0, atol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    for _ in range(2):
        model(*inputs).square().mean().backward()
        learned = {name for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    # Two factors of two projections a way.
    assert len(learned) == (4 if args is None else 8)
    assert all(".lora_A." in name or ".lora_B." in name for name in learned)
    adapted = model(*inputs).detach()
    assert (adapted - before).abs().max() > 1e-3

    # Into another model of the same base.
    adapter = peft.get_peft_model_state_dict(model)
    other = peft.get_peft_model(Layer(args, biased=True, causal=True, subln=True), config)
    other.load_state_dict(model.get_base_model().state_dict(), strict=False)
    peft.set_peft_model_state_dict(other, adapter)
    torch.testing.assert_close(other(*inputs), adapted)

    merged = model.merge_and_unload()
    assert {name for name, _ in merged.named_parameters()} == names
    assert not any(type(part).__module__.startswith("peft") for part in merged.modules())
    torch.testing.assert_close(merged(*inputs), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("args", [None, {"multiway": True}], ids=["one way", "multiway"])
def test_int8_weights(args: object) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = Layer(args, biased=True, causal=True, weights=True).eval()
    inputs = tokens(), padding()
    with torch.no_grad():
        exact = layer(*inputs)[0]
        quantize_(layer, Int8WeightOnlyConfig())
        out, weights = layer(*inputs)
        # The same layer of the numbers that are left of its weights.
        rounded = Layer(args, biased=True, causal=True, weights=True).eval()
        linears = 0
        for part, plain in zip(layer.modules(), rounded.modules(), strict=True):
            if isinstance(part, nn.Linear):
                assert part.weight.qdata.dtype == torch.int8
                plain.weight.copy_(part.weight.dequantize())
                linears += 1
        expected, expected_weights = rounded(*inputs)
    assert linears == (4 if args is None else 8)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.clone(), expected_weights.clone(), rtol=1e-4, atol=1e-5)
    # 8 bits a weight: errors of about half of 1 / 127 of the largest.
    assert 0 < (out - exact).norm() / exact.norm() < 1 / 64
