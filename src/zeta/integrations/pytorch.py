"""`MultiheadAttention`: torch's attention module, computed by `zeta.attention`.

Shapes: B batch, H heads, T target length, S source length, X extra keys, E embedding, D head
dimension.
"""

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeta.integrations.pytorch_calls import attention_call, output_of, weights_of
from zeta.integrations.pytorch_inputs import (
    check_inputs,
    check_tensor,
    check_unbatched_padding,
    each,
    nested_like,
    padding_of_nested,
    without_queries,
)
from zeta.nn.checks import check_flags, check_projected

Weights: TypeAlias = Literal["zeta", "torch"]


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` in all but the computation.

    The constructor, the attributes, the state dict, the call and what it returns are torch's; it is
    a subclass, so that ``isinstance`` holds. Each call is computed by `zeta.attention`, whatever
    the mode: ``nn.TransformerEncoderLayer``, which reads the parameters of its attention and
    computes by itself in ``eval()``, does not do so with this one. What it does differently:

    - a query with every key hidden gets weights and, before the output projection, an output of 0;
    - ``is_causal=True`` without a mask is causal. With a mask it is torch's hint that the mask is
      the causal one; where queries and keys differ in number the mask itself is taken;
    - the weights are those before dropout, whose rows sum to 1, and are computed when they are
      first used: ``need_weights=True`` costs nothing until then;
    - wrong arguments are a ``ValueError`` or a ``TypeError`` that names them.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype: As torch's; ``dropout`` below 1.
        weights: ``"torch"``: in training, the weights after dropout.

    Raises:
        ValueError: ``dropout`` is not in ``[0, 1)``, or ``weights`` is unknown.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weights: Weights = "zeta",
    ) -> None:
        check_weights(weights)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1); got {dropout}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self.weights = weights
        self.register_forward_pre_hook(_keep_from_fast_path)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: ``(T, B, E)``; with ``batch_first`` ``(B, T, E)``; or unbatched ``(T, E)``. A
                nested tensor, in self-attention with ``batch_first``, is padded and gives one.
            key: ``(S, B, kdim)``, or as the query.
            value: ``(S, B, vdim)``, or as the query.
            key_padding_mask: ``(B, S)``, unbatched ``(S,)``. bool, True hides the key; floating
                point is added to the scores. Its type need not be that of ``attn_mask``.
            need_weights: Return the weights too.
            attn_mask: ``(T, S)`` or ``(B * H, T, S)``. bool, True hides; floating point is added to
                the scores and gets its gradient.
            average_attn_weights: Over the heads, which are never held all at once.
            is_causal: Hide later keys; with ``attn_mask`` a hint, see the class.

        Returns:
            The output in the layout of the query, and the weights or None: ``(B, T, S)``, or
            ``(B, H, T, S)`` without ``average_attn_weights``; S counts ``bias_k`` and the zeros of
            ``add_zero_attn``, at the end. Unbatched without B.

        Raises:
            ValueError: A shape or a device is wrong.
            TypeError: A type or a dtype is wrong.
        """
        check_flags(
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            check_tensor(name, mask, optional=True)
        check_inputs(
            query, key, value, (self.embed_dim, self.kdim, self.vdim), batch_first=self.batch_first
        )
        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        nested = query if query.is_nested else None
        if nested is not None:
            key_padding_mask = padding_of_nested(query, attn_mask, key_padding_mask)
            query = key = value = query.to_padded_tensor(0.0)
        if not batched:
            key_padding_mask = check_unbatched_padding(key_padding_mask, key.shape[0])
            query, key, value = each(lambda x: x.unsqueeze(0), query, key, value)
        try:
            query_BHTD, key_BHSD, value_BHSD = (
                _heads(projected, self.num_heads, batch_first)
                for projected in self._project(query, key, value)
            )
        except RuntimeError:
            for name, x in (("query", query), ("key", key), ("value", value)):
                check_projected(name, x, self)
            raise
        key_BHSD, value_BHSD, num_extra = self._with_extra_keys(key_BHSD, value_BHSD)
        call = attention_call(
            query_BHTD, key_BHSD, value_BHSD, num_extra=num_extra, attn_mask=attn_mask,
            key_padding_mask=key_padding_mask, is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        out_BHTD = output_of(call)
        out = out_BHTD.transpose(1, 2) if batch_first else out_BHTD.permute(2, 0, 1, 3)
        out = self.out_proj(out.flatten(2))
        if nested is not None:
            out = nested_like(out, nested)
        elif not batched:
            out = out.squeeze(0)
        if not need_weights:
            return out, None
        if nested is not None and key_padding_mask is not None:
            call = without_queries(call, key_padding_mask)
        weights = weights_of(
            call, average=average_attn_weights, after_dropout=self.weights == "torch",
            batched=batched,
        )  # fmt: skip
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Iterable[Tensor]:
        """Queries, keys and values, projected together where they are the same tensor."""
        weight: Tensor | None = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        size = self.embed_dim
        weights: Iterable[Tensor]
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        elif key is value:
            query_weight, weight = weight.split((size, 2 * size))
            query_bias, bias = (None, None) if bias is None else bias.split((size, 2 * size))
            queries = F.linear(query, query_weight, query_bias)
            return queries, *F.linear(key, weight, bias).chunk(2, -1)
        else:
            weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return map(F.linear, (query, key, value), weights, biases)

    def _with_extra_keys(self, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values followed by ``bias_k`` and ``bias_v`` and by zeros; how many follow."""
        keys, values = [key_BHSD], [value_BHSD]
        sizes = (*key_BHSD.shape[:2], 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            for parts, extra in ((keys, self.bias_k), (values, self.bias_v)):
                extra = extra.to(key_BHSD.dtype).view(1, self.num_heads, 1, -1)
                parts.append(extra.expand(sizes))
        if self.add_zero_attn:
            for parts in (keys, values):
                parts.append(key_BHSD.new_zeros(sizes))
        num_extra = len(keys) - 1
        if not num_extra:
            return key_BHSD, value_BHSD, 0
        return torch.cat(keys, 2), torch.cat(values, 2), num_extra

    def extra_repr(self) -> str:
        """What ``print`` shows beside the submodule."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


def obstacle(module: nn.MultiheadAttention) -> str | None:
    """Why `adopt` cannot take a module of torch's; None if it can."""
    if type(module) is not nn.MultiheadAttention:
        return "it is a subclass of torch.nn.MultiheadAttention, which may compute something else"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if module._compiled_call_impl is not None:
        return "it has been compiled: swap first, then compile"
    if not 0.0 <= module.dropout < 1.0:
        return f"its dropout must be in [0, 1); got {module.dropout}"
    return None


def adopt(module: nn.MultiheadAttention, weights: Weights = "zeta") -> MultiheadAttention:
    """Make a module of torch's one of Zeta's. The object stays the same.

    So everything that refers to it goes on: other modules, hooks and their handles, optimizers.

    Args:
        module: One without an `obstacle`.
        weights: See `MultiheadAttention`.

    Raises:
        ValueError: There is an obstacle, or ``weights`` is unknown.
    """
    check_weights(weights)
    reason = obstacle(module)
    if reason is not None:
        raise ValueError(f"this module cannot be computed by Zeta: {reason}")
    module.__class__ = MultiheadAttention
    assert isinstance(module, MultiheadAttention)
    module.weights = weights
    module.register_forward_pre_hook(_keep_from_fast_path)
    return module


def check_weights(weights: object) -> None:
    """Raise ValueError unless it is one of the two that are known."""
    if weights not in ("zeta", "torch"):
        raise ValueError(f"weights must be 'zeta' or 'torch'; got {weights!r}")


def _keep_from_fast_path(module: nn.Module, arguments: Any) -> None:
    """Does nothing, but be there.

    ``nn.TransformerEncoderLayer`` computes its attention by itself in ``eval()``, unless a module
    inside it has a hook, which would not be called then.
    """


def _heads(projected: Tensor, num_heads: int, batch_first: bool) -> Tensor:
    """``(B, L, H * D)`` or ``(L, B, H * D)`` as a view ``(B, H, L, D)``."""
    split: Tensor = projected.unflatten(-1, (num_heads, -1))
    return split.transpose(1, 2) if batch_first else split.permute(1, 2, 0, 3)
