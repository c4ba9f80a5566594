"""Draws the pictures of the pages from the library itself: ``python docs/pictures.py``.

They lie in docs/pictures/, so that the pages can be read on a code host; draw them again when what
they show changes. Needs matplotlib.
"""

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zeta import biases, masks
from zeta.nn import MultiheadAttention, RelativePositionBias, XPos
from zeta.plots import attention_map, save
from zeta.positions import alibi_slopes, t5_buckets

FOLDER = Path(__file__).parent / "pictures"


def masks_picture() -> Figure:
    """The mask values, as what each of eight queries sees."""
    length = 8
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
    shown = {
        "Causal()": masks.Causal(),
        "SlidingWindow(3)": masks.SlidingWindow(3),
        "PrefixLM([3])": masks.PrefixLM(torch.tensor([3])),
        "Causal() & Documents(ids)": masks.Causal() & masks.Documents(ids),
        "Padding([5])": masks.Padding(torch.tensor([5])),
    }
    figure, axes = _figure(len(shown), width=2.3, height=2.5)
    for axis, (title, mask) in zip(axes, shown.items(), strict=True):
        axis.imshow(mask.dense(1, 1, length, length)[0, 0].numpy(), cmap="Blues", vmin=0, vmax=1.4)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        for place in range(1, length):
            axis.axhline(place - 0.5, color="white", linewidth=1)
            axis.axvline(place - 0.5, color="white", linewidth=1)
    axes[0].set_ylabel("query")
    axes[0].set_xlabel("key")
    return figure


def biases_picture() -> Figure:
    """T5's buckets, and ALiBi, over the distance of a key."""
    offset = torch.arange(-160, 161)
    figure, (left, right) = _figure(2, width=4.2, height=2.8)
    for bidirectional in (True, False):
        buckets = t5_buckets(offset, bidirectional=bidirectional)
        left.step(
            offset.numpy(), buckets.numpy(), label=f"bidirectional={bidirectional}", where="mid"
        )
    left.set_title("T5: bucket of a distance", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    values = biases.Alibi(alibi_slopes(4)).at(offset)
    for head in range(4):
        right.plot(offset.numpy(), values[:, head].numpy(), label=f"head {head}")
    right.set_title("ALiBi: added to the score", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("key position - query position")
    return figure


def positions_picture() -> Figure:
    """The score of equal query and key over their distance: xPos with and without its scale."""
    head_dim, distance = 64, torch.arange(0, 1025, 4)
    ones = torch.ones(1, 1, len(distance), head_dim)
    figure, (axis,) = _figure(1, width=6.5, height=2.8)
    for title, base in (("rotary", 1e9), ("xPos, base 512", 512)):
        rotation = XPos(head_dim, base)
        query = rotation.queries(ones, positions=distance)
        key = rotation.keys(ones[:, :, :1], positions=0)
        scores = (query * key).sum(-1)[0, 0] / head_dim
        axis.plot(distance.numpy(), scores.numpy(), label=title)
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set_xlabel("query position - key position")
    axis.set_title("Score of equal vectors", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return figure


def weights_picture() -> Figure:
    """One head's weights under a causal mask and a T5 bias."""
    torch.manual_seed(2)
    words = "the cat sat on the mat".split()
    attention = MultiheadAttention(None, 32, 4, self_attention=True)
    rel_pos = RelativePositionBias(bidirectional=False, n_heads=4)
    x = torch.randn(len(set(words)), 32)[[sorted(set(words)).index(word) for word in words]]
    _, weights = attention(x[None], x[None], x[None], rel_pos=rel_pos, is_causal=True)
    return attention_map(weights.heads(1)[0], words, words, title="attn_weights.heads(1)[0]")


def caches_picture() -> Figure:
    """What each cache holds of a sequence, over its length."""
    from zeta.caches import DynamicCache, QuantizedCache, RollingCache, StaticCache

    lengths = range(128, 4097, 128)
    kinds = {
        "StaticCache(4096)": lambda: StaticCache(4096),
        "DynamicCache()": DynamicCache,
        "QuantizedCache(8)": lambda: QuantizedCache(bits=8),
        "QuantizedCache(4)": lambda: QuantizedCache(bits=4),
        "RollingCache(1024)": lambda: RollingCache(1024),
    }
    figure, (axis,) = _figure(1, width=6.5, height=3)
    block = torch.zeros(1, 8, 128, 64, dtype=torch.bfloat16)
    for title, make in kinds.items():
        cache, held = make(), []
        for _ in lengths:
            cache.update(block, block)
            held.append(cache.nbytes / 2**20)
        axis.plot(lengths, held, label=title)
    axis.set_xlabel("tokens, 8 heads of 64 in bfloat16")
    axis.set_ylabel("MiB")
    axis.legend(frameon=False, fontsize=8)
    return figure


PICTURES = {
    "masks": masks_picture,
    "biases": biases_picture,
    "positions": positions_picture,
    "weights": weights_picture,
    "caches": caches_picture,
}


def _figure(columns: int, *, width: float, height: float) -> tuple[Figure, list]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        with torch.no_grad():
            save(draw(), FOLDER / f"{name}.png")
        print(f"docs/pictures/{name}.png")


if __name__ == "__main__":
    main()
