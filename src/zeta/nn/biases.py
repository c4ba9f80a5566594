"""Position biases with parameters of their own: T5's `RelativePositionBias`, and `ALiBi`.

Given as ``rel_pos=`` to an attention they stay a few numbers a head; only calling one makes a
tensor.

Shapes: B batch, H heads, T target length, S source length, N buckets.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zeta import biases
from zeta.positions import alibi_slopes
from zeta.values import Tile, check_integer, check_size


class RelativePositionBias(nn.Module):
    """A learned bias for each head and each bucket of distances (Raffel et al., T5, 2020, section
    2.1).

    Its parameter is ``relative_attention_bias.weight``, ``(num_buckets, n_heads)``, as in
    TorchScale. The argument names are TorchScale's too. One module may serve all layers, as in T5.

    Args:
        bidirectional: Half of the buckets for keys after the query. False suits causal attention,
            where those keys are hidden.
        num_buckets: Buckets, both directions together.
        max_distance: Distances from here on share the last bucket.
        n_heads: Heads of the attention.
        device: Of the parameter.
        dtype: Of the parameter.

    Raises:
        TypeError: A number is no integer, or ``bidirectional`` neither True nor False.
        ValueError: There are no heads, too few buckets, or they reach no further than the exact
            ones.
    """

    def __init__(
        self,
        bidirectional: bool = True,
        num_buckets: int = 32,
        max_distance: int = 128,
        n_heads: int = 12,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("num_buckets", num_buckets)
        check_size("n_heads", n_heads)
        self.bidirectional = bidirectional
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.n_heads = n_heads
        self.relative_attention_bias = nn.Embedding(
            num_buckets, n_heads, device=device, dtype=dtype
        )
        self.value()  # Checks the others.

    def reset_parameters(self) -> None:
        """Draw the biases from a standard normal distribution, as ``nn.Embedding`` does."""
        self.relative_attention_bias.reset_parameters()

    def value(self) -> biases.Bucketed:
        """The bias as a value for `zeta.attention`; gradients reach the parameter."""
        return biases.Bucketed(
            table_of(self.relative_attention_bias, self.num_buckets),
            bidirectional=self.bidirectional,
            max_distance=self.max_distance,
        )

    def forward(self, batch_size: int, qlen: int, klen: int, step: int | None = None) -> Tensor:
        """The bias as a tensor, as TorchScale makes it.

        Args:
            batch_size: Number of sequences; the bias is repeated for each.
            qlen: Number of queries, T.
            klen: Number of keys, S, at positions 0 to S - 1.
            step: Position of the first query; 0 by default.

        Returns:
            ``(B * H, T, S)``, in the parameter's dtype.

        Raises:
            TypeError: A number is no integer.
            ValueError: A size is not positive.
        """
        bias = self.value()
        return _dense(bias, batch_size, qlen, klen, step).to(bias.table.dtype)


class ALiBi(nn.Module):
    """Attention with linear biases (Press et al., 2022): ``-slope * |query position - key
    position|``.

    Without parameters, and float32 whatever the dtype of the model around it.

    Args:
        num_heads: Heads of the attention.
        device: Of the slopes.

    Raises:
        TypeError: ``num_heads`` is no integer.
        ValueError: It is not positive.
    """

    slopes: Tensor

    def __init__(self, num_heads: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        check_size("num_heads", num_heads)
        self.num_heads = num_heads
        self.register_buffer("slopes", alibi_slopes(num_heads, device=device), persistent=False)

    def reset_parameters(self) -> None:
        """Fill the buffer: FSDP asks that of whatever has one and was made without memory."""
        self.slopes.copy_(alibi_slopes(self.num_heads, device=self.slopes.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ALiBi":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        # Neither rounded by `.bfloat16()` nor left undefined by `.to_empty()`.
        self.slopes = alibi_slopes(self.num_heads, device=self.slopes.device)
        return self

    def value(self) -> biases.Alibi:
        """The bias as a value for `zeta.attention`."""
        return biases.Alibi(self.slopes)

    def forward(self, batch_size: int, qlen: int, klen: int, step: int | None = None) -> Tensor:
        """The bias as a float32 tensor ``(B * H, T, S)``; see `RelativePositionBias.forward`."""
        return _dense(self.value(), batch_size, qlen, klen, step)


def table_of(embedding: nn.Module, num_buckets: int, device: torch.device | None = None) -> Tensor:
    """``(num_buckets, n_heads)``: an embedding's parameter, or what else it makes of each bucket.

    Args:
        embedding: It is called where it is more than torch's: adapted, sharded, with hooks.
        num_buckets: Its rows.
        device: Of what it is called with; by default its parameters'.
    """
    own: Any = embedding.__dict__
    if type(embedding) is nn.Embedding and not (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
    ):
        return embedding.weight
    if device is None:
        device = next(embedding.parameters()).device
    table: Tensor = embedding(torch.arange(num_buckets, device=device))
    return table


def _dense(
    bias: biases.OffsetBias, batch_size: int, target: int, source: int, step: int | None
) -> Tensor:
    for name, size in (("batch_size", batch_size), ("qlen", target), ("klen", source)):
        check_size(name, size)
    if step is not None:
        check_integer("step", step)
    device = bias.tensors()[0].device
    first = 0 if step is None else step
    query_position_T = torch.arange(first, first + target, device=device)
    key_position_S = torch.arange(source, device=device)
    tile = Tile(query_position_T[None, None, :, None], key_position_S[None, None, None, :])
    return bias.values(tile).expand(batch_size, -1, -1, -1).flatten(0, 1)
