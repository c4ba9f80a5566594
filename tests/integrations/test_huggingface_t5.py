"""T5's position bias as its table, where the table is more than a parameter."""

import accelerate
import peft
import pytest
import torch
from torch import nn

from tests.integrations.huggingface_families import FAMILIES, valid
from zeta.biases import Bucketed
from zeta.integrations import huggingface
from zeta.integrations.huggingface.t5 import TableBias

pytestmark = pytest.mark.usefixtures("registered")


def test_an_adapter_on_the_table_is_called_and_learns() -> None:
    family = FAMILIES["t5"]
    model = family.build(torch.float64, "eager")
    config = peft.LoraConfig(
        r=2, target_modules=["relative_attention_bias"], init_lora_weights=False
    )
    adapted = peft.inject_adapter_in_model(config, model)
    given = family.inputs("right", torch.float64)
    results = {}
    for implementation in ("eager", "zeta"):
        huggingface.register(structured_bias=implementation == "zeta")
        model.set_attn_implementation(implementation)
        adapted.zero_grad()
        out = valid(family, given, adapted(**given))
        out.square().mean().backward()
        gradients = [p.grad for name, p in adapted.named_parameters() if "lora_" in name]
        assert len(gradients) == 4
        results[implementation] = [out, *gradients]
    torch.testing.assert_close(results["zeta"], results["eager"])


def test_an_offloaded_table_is_there_when_it_is_needed() -> None:
    huggingface.register(structured_bias=True)
    family = FAMILIES["t5"]
    model = family.build(torch.float64, "zeta")
    given = family.inputs("right", torch.float64)
    with torch.no_grad():
        expected = model(**given).logits
        offloaded = accelerate.cpu_offload(model, torch.device("cpu"))
        assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.is_meta
        found = offloaded(**given).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("past", [3, torch.tensor(3)])
def test_a_table_goes_from_device_to_device(past: int | torch.Tensor) -> None:
    """Accelerate sends what a model hands from layer to layer after it."""
    table = nn.Parameter(torch.randn(8, 2))
    bias = TableBias(Bucketed(table, max_distance=12), past)
    sent = accelerate.utils.send_to_device(bias, torch.device("meta"))
    assert sent.value is not None
    assert sent.value.table.is_meta
    assert sent.value.max_distance == 12
    assert sent.past == 3 if isinstance(past, int) else sent.past.is_meta
    assert TableBias(None).to("meta") == TableBias(None)
