"""The dropout hash: its definition, its statistics, and its independence of how work is cut."""

import pytest
import torch

import zeta
from zeta.ops.call import AttentionCall
from zeta.ops.dropout import keep_mask


def call(dropout_p: float, seed: int, batch: int = 1, heads: int = 1, length: int = 8) -> object:
    tensor = torch.zeros(batch, heads, length, 4)
    return AttentionCall.checked(tensor, tensor, tensor, dropout_p=dropout_p, seed=seed)


def mix(x: int) -> int:
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def signed(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - 2**32 if x >= 2**31 else x


def kept(seed: int, batch: int, head: int, query: int, key: int, dropout_p: float) -> bool:
    """The definition, in Python's integers."""
    s = mix(mix(seed) + (seed >> 32))
    row = mix(mix(mix(s + batch) + head) + query) | 1
    column = mix(mix(s + 0x9E3779B9) + key) | 1
    return signed(row * column) >= round(dropout_p * 2**32) - 2**31


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_it_is_the_documented_hash(seed: int, dropout_p: float) -> None:
    made = call(dropout_p, seed, batch=2, heads=3)
    mask = keep_mask(made, made.tile())
    for b in range(2):
        for h in range(3):
            for i in range(8):
                for j in range(8):
                    assert mask[b, h, i, j].item() == kept(seed, b, h, i, j, dropout_p)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_compiled_code_draws_the_same() -> None:
    """Also from a seed that the compiler knows, where it writes all of the hash as one loop."""
    query = torch.randn(2, 3, 40, 4)

    def attend(seed: int | torch.Tensor) -> torch.Tensor:
        return zeta.ops.attention(
            query, query, query, dropout_p=0.5, seed=seed, backend="reference"
        )

    compiled = torch.compile(attend, fullgraph=True)
    torch.testing.assert_close(compiled(5), attend(5))
    torch.testing.assert_close(compiled(torch.tensor(6)), attend(6))


def test_a_tile_draws_what_the_whole_draws() -> None:
    made = call(0.3, 5, batch=3, heads=4, length=20)
    whole = keep_mask(made, made.tile())
    parts = (slice(1, 2), slice(2, 4), slice(3, 17), slice(5, 6))
    assert torch.equal(keep_mask(made, made.tile(*parts)), whole[parts])


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 123456789012345])
def test_weights_are_dropped_independently(dropout_p: float, seed: int) -> None:
    length = 1024
    made = call(dropout_p, seed, heads=2, length=length)
    deviation = (1 - dropout_p - keep_mask(made, made.tile())[0].double()) / (
        dropout_p * (1 - dropout_p)
    ) ** 0.5
    # Each statistic is standard normal if weights are independent; six deviations never happen.
    statistics = {
        "mean": deviation.sum() / deviation.numel() ** 0.5,
        "heads": (deviation[0] * deviation[1]).sum() / length,
        "next key": (deviation[:, :, 1:] * deviation[:, :, :-1]).sum() / (2 * length**2) ** 0.5,
        "next query": (deviation[:, 1:] * deviation[:, :-1]).sum() / (2 * length**2) ** 0.5,
        "row means": ((deviation.sum(-1) ** 2 / length).mean() - 1) * length**0.5,
        "column means": ((deviation.sum(-2) ** 2 / length).mean() - 1) * length**0.5,
    }
    for name, value in statistics.items():
        assert abs(value.item()) < 6, name
    # Pairs of rows, and of columns, must be uncorrelated: the hash is the product of one of each.
    for matrix in (deviation[0], deviation[0].mT):
        correlation = matrix @ matrix.mT / length**0.5
        correlation.fill_diagonal_(0)
        assert abs(correlation.square().sum() / (length * (length - 1)) - 1) < 0.05


def test_extreme_probabilities() -> None:
    never = call(1e-12, 3, length=64)
    assert keep_mask(never, never.tile()).all()
    almost_always = call(1 - 1e-12, 3, length=64)
    assert not keep_mask(almost_always, almost_always.tile()).any()
