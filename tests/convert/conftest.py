"""What every test of conversions gets, and checkpoints for those that ask."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor, nn
from torchscale.component.multihead_attention import MultiheadAttention as TorchScale
from torchscale.component.multiway_network import MultiwayNetwork


@pytest.fixture(autouse=True)
def _torchscale_is_whole() -> Iterator[None]:
    """Nothing of the package itself is changed."""
    forward, network = TorchScale.forward, MultiwayNetwork.forward
    yield
    assert TorchScale.forward is forward
    assert MultiwayNetwork.forward is network


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Two layers with attention."""
    layer = nn.TransformerEncoderLayer(16, 4, 24)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).state_dict()


@pytest.fixture
def checkpoint(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(state, path, {"format": "pt", "step": "7"})
    return path
