"""What every test of conversions gets."""

from collections.abc import Iterator

import pytest
from torchscale.component.multihead_attention import MultiheadAttention as TorchScale
from torchscale.component.multiway_network import MultiwayNetwork


@pytest.fixture(autouse=True)
def _torchscale_is_whole() -> Iterator[None]:
    """Nothing of the package itself is changed."""
    forward, network = TorchScale.forward, MultiwayNetwork.forward
    yield
    assert TorchScale.forward is forward
    assert MultiwayNetwork.forward is network
