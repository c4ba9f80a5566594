"""The optimizers and the schedule of the examples."""

import pytest
import torch
from torch import nn

from zeta.examples.encoder_decoder import EncoderDecoder
from zeta.examples.language_model import LanguageModel
from zeta.examples.training import fit, optimizers


@pytest.mark.parametrize("model", [LanguageModel(embed_dim=32), EncoderDecoder(5, 7, embed_dim=32)])
def test_every_parameter_has_one_optimizer(model: nn.Module) -> None:
    muon, adam = optimizers(model, learning_rate=0.01)
    held = [p for both in (muon, adam) for group in both.param_groups for p in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held})
    assert {id(parameter) for parameter in held} == {id(p) for p in model.parameters()}
    assert all(parameter.ndim == 2 for parameter in muon.param_groups[0]["params"])
    tables = adam.param_groups[1]
    assert {tuple(table.shape) for table in tables["params"]} == {(32, 4)}
    assert tables["lr"] == pytest.approx(0.1)


def test_model_learns_by_heart() -> None:
    model = LanguageModel(embed_dim=32, num_heads=2, num_layers=1)
    text_1T = torch.tensor([list(b"what has been will be again")])

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(text_1T[:, :-1])[0], text_1T[0, 1:])

    losses = list(fit(model, loss, steps=60))
    assert len(losses) == 60
    assert losses[0] > 5.0
    assert losses[-1] < 1.0
    assert not model.training
