"""Checkpointing, gradient scaling, Lightning and Accelerate: the steps of a plain loop."""

from typing import Any

import accelerate
import pytest
import pytorch_lightning
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tests.ecosystem.layers import Layer, batches, gradients, loss, padding, tokens
from zeta.nn import RotaryEmbedding

LAYERS: dict[str, dict[str, Any]] = {
    "T5": {"biased": True, "causal": True, "weights": True},
    "xPos, sub-LN": {"args": {"xpos_rel_pos": True}, "subln": True, "weights": True},
    "grouped, rotary": {"num_kv_heads": 2, "position": RotaryEmbedding(8), "weights": True},
    "multiway": {"args": {"multiway": True}, "biased": True, "weights": True},
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_checkpoint_draws_the_same_dropout(options: dict[str, Any], reentrant: bool) -> None:
    layer = Layer(dropout=0.4, **options)
    results = []
    for checkpointed in (False, True):
        x = tokens(3, 40).requires_grad_()
        layer.zero_grad()
        torch.manual_seed(7)
        if checkpointed:
            out, weights = checkpoint(layer, x, padding(3, 40), use_reentrant=reentrant)
        else:
            out, weights = layer(x, padding(3, 40))
        torch.randn(3)  # Whatever else draws numbers before the backward pass.
        (out.square().sum() + weights.square().sum()).backward()
        results.append([out.detach(), weights.detach().clone(), x.grad, gradients(layer)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert not torch.equal(results[0][0], layer.eval()(tokens(3, 40), padding(3, 40))[0])


def test_scaled_gradients_are_unscaled_to_themselves() -> None:
    layer = Layer(biased=True, causal=True)
    # A power of two; larger ones overflow.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    results = []
    for scaled in (False, True):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            total = loss(layer(tokens()).float(), tokens())
        if scaled:
            scaler.scale(total).backward()
            scaler.unscale_(optimizer)
        else:
            total.backward()
        results.append(gradients(layer))
    # Scaling may only help numbers that are small for float16.
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-5)
    before = layer.attention.q_proj.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert not torch.equal(layer.attention.q_proj.weight, before)


def test_a_step_whose_gradients_overflow_is_left_out() -> None:
    layer = Layer(biased=True, causal=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.float16):
        total = loss(layer(tokens()), tokens())
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def trained(accumulated: int = 1) -> dict[str, Tensor]:
    """The state of the layer after a plain loop over four batches."""
    layer = Layer(dropout=0.1, biased=True, causal=True, subln=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    torch.manual_seed(3)
    for step, x in enumerate(batches(4), start=1):
        (loss(layer(x), x) / accumulated).backward()
        if step % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    return layer.state_dict()


def test_the_plain_loop_learns() -> None:
    start = Layer(dropout=0.1, biased=True, causal=True, subln=True).state_dict()
    for accumulated in (1, 2):
        state = trained(accumulated)
        assert not torch.equal(state["attention.q_proj.weight"], start["attention.q_proj.weight"])
        assert not torch.equal(
            state["bias.relative_attention_bias.weight"],
            start["bias.relative_attention_bias.weight"],
        )


class Lit(pytorch_lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(dropout=0.1, biased=True, causal=True, subln=True)

    def on_train_start(self) -> None:
        torch.manual_seed(3)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return loss(self.layer(batch), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


# Lightning's own: a deprecated class of torch, and its advice on workers.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_lightning(accumulated: int) -> None:
    model = Lit()
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=accumulated,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(batches(4), batch_size=None))  # type: ignore[arg-type]  # a list is a data set
    assert trainer.global_step == 4 // accumulated
    torch.testing.assert_close(model.layer.state_dict(), trained(accumulated))


def test_accelerate() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    layer = Layer(dropout=0.1, biased=True, causal=True, subln=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    loader = DataLoader(batches(4), batch_size=None)  # type: ignore[arg-type]  # a list is a data set
    layer, optimizer, loader = accelerator.prepare(layer, optimizer, loader)
    for step, x in enumerate(loader):
        if step == 0:
            torch.manual_seed(3)  # The loader draws a number of its own when it starts.
        with accelerator.accumulate(layer):
            accelerator.backward(loss(layer(x), x))
            optimizer.step()
            optimizer.zero_grad()
    state = accelerator.unwrap_model(layer).state_dict()
    torch.testing.assert_close(state, trained(accumulated=2))
