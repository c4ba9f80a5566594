"""`MultiheadAttention`, the documented module: projections around `zeta.attention`.

Shapes: B batch, H heads, G key heads, T target length, S source length, N source tokens of this
call, E embedding, D head dimension.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zeta.caches import Cache, Cached, CrossCache
from zeta.nn import checks
from zeta.nn.anchors import Blocks
from zeta.nn.calls import NeedWeights, attend, attention_call, uncached
from zeta.nn.config import AttentionConfig
from zeta.nn.extra_keys import ExtraKeys
from zeta.nn.initialization import draw_extra_key, draw_inputs, draw_output, reset_norms
from zeta.nn.masking import AttentionMask, RelativePosition
from zeta.nn.multiway import MultiwayWrapper
from zeta.nn.norms import QueryKeyNorm, query_key_norm
from zeta.nn.placement import Placement, Route, SplitArgument, batched_split, through
from zeta.nn.positions import Rotation, XPos
from zeta.nn.projections import project, project_heads
from zeta.nn.state import IncrementalState, open_state
from zeta.ops.weights import without_batch


class MultiheadAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017), with TorchScale's extensions.

    Its parameters, ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj`` and with ``subln``
    ``inner_attn_ln``, have TorchScale's names; under multiway each is a `MultiwayNetwork` of ``A``
    and ``B``.

    Args:
        args: Model-wide configuration: None, a mapping or an object with attributes; see
            `AttentionConfig`. ``xpos_rel_pos`` concerns self-attention; a model's cross-attention,
            built from the same configuration, goes without.
        embed_dim: Features of queries and of the output.
        num_heads: Query heads.
        dropout: Probability in ``[0, 1)`` with which a weight is dropped in training. Each call
            draws its own seed from torch's generator.
        self_attention: Queries and keys are one sequence.
        encoder_decoder_attention: Keys are an encoder's. At most one of the two can be True.
        subln: LayerNorm before the output projection (Magneto, 2022). Self-attention only.
        num_kv_heads: Key heads, shared by equally many query heads each (Ainslie et al., GQA,
            2023); ``num_heads`` by default.
        head_dim: Features of a head; ``embed_dim / num_heads`` by default.
        kdim: Features of keys; ``embed_dim`` by default.
        vdim: Features of values; ``embed_dim`` by default.
        bias: Whether the projections have biases.
        scale: Factor of the scores, a number; ``1 / sqrt(head_dim)`` by default, with
            ``qk_norm="l2"`` too, where scores would otherwise be cosines: about 10 is usual there.
        qk_norm: ``"rms"`` or ``"l2"``: normalise queries and keys, a head at a time, unrotated.
        position: `RotaryEmbedding` or `XPos`. It may be shared by many attentions.
        window: A query sees itself and the ``window - 1`` tokens before it.
        need_weights: What `forward` returns second, unless it is told otherwise.
        device: Of the parameters.
        dtype: Of the parameters.
        add_bias_kv: Every query also sees a learned key and value, ``bias_k`` and ``bias_v``,
            ``(1, 1, num_kv_heads * head_dim)``, whatever is hidden from it. They are the same for
            every way of multiway, and the key is neither normalised nor rotated.
        add_zero_attn: Every query also sees a key and a value of zeros.

    Raises:
        TypeError: An argument or a field of ``args`` has the wrong type.
        ValueError: A size is wrong, a field of ``args`` is misspelt, or a feature does not exist in
            this kind of attention.
    """

    def __init__(
        self,
        args: Any,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
        subln: bool = False,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        scale: float | None = None,
        qk_norm: QueryKeyNorm | None = None,
        position: Rotation | None = None,
        window: int | None = None,
        need_weights: NeedWeights = "lazy",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
    ) -> None:
        super().__init__()
        config = AttentionConfig.from_args(args)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        checks.check_sizes(embed_dim, num_heads, num_kv_heads, head_dim, kdim, vdim)
        checks.check_numbers(dropout, scale)
        checks.check_flags(bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn)
        checks.check_kind(self_attention, encoder_decoder_attention, subln, window, need_weights)
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.dropout = dropout
        self.self_attention = self_attention
        self.encoder_decoder_attention = encoder_decoder_attention
        self.scale = 1.0 / math.sqrt(self.head_dim) if scale is None else float(scale)
        self.window = window
        self.need_weights = need_weights
        self.multiway = config.num_ways > 1

        inner, inner_kv = num_heads * self.head_dim, num_kv_heads * self.head_dim
        eps = config.layernorm_eps
        linear = partial(nn.Linear, bias=bias, device=device, dtype=dtype)
        norm = partial(nn.LayerNorm, eps=eps, device=device, dtype=dtype)
        self.k_proj = MultiwayWrapper(config, linear(self.kdim, inner_kv))
        self.v_proj = MultiwayWrapper(config, linear(self.vdim, inner_kv))
        self.q_proj = MultiwayWrapper(config, linear(embed_dim, inner))
        self.out_proj = MultiwayWrapper(config, linear(inner, embed_dim))
        self.inner_attn_ln = MultiwayWrapper(config, norm(inner)) if subln else None
        self.q_norm = query_key_norm(qk_norm, self.head_dim, eps, device, dtype)
        self.k_norm = query_key_norm(qk_norm, self.head_dim, eps, device, dtype)
        checks.check_position(
            position, config.xpos_rel_pos, self.head_dim, self_attention, encoder_decoder_attention
        )
        if config.xpos_rel_pos and self_attention:
            position = XPos(self.head_dim, config.xpos_scale_base, device=device)
        # TorchScale's name, under which xPos stands in the state dict, whatever the rotation.
        self.xpos = position
        self.num_extra_keys = int(add_bias_kv) + int(add_zero_attn)
        self.add_zero_attn = add_zero_attn
        self.bias_k, self.bias_v = (
            nn.Parameter(torch.empty(1, 1, inner_kv, device=device, dtype=dtype))
            if add_bias_kv
            else None
            for _ in range(2)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters, for every way.

        Xavier uniform (Glorot and Bengio, 2010) with gain ``1 / sqrt(2)`` for queries, keys and
        values and gain 1 for the output, whose bias is 0; norms are reset; other biases as in
        ``nn.Linear``; ``bias_k`` and ``bias_v`` Xavier normal.

        Raises:
            TypeError: A projection has been replaced by a layer that is no ``nn.Linear``, or its
                weight is no parameter, as a pruned one's.
        """
        draw_inputs((self.q_proj, self.k_proj, self.v_proj))
        draw_output(self.out_proj)
        reset_norms((self.inner_attn_ln, self.q_norm, self.k_norm))
        draw_extra_key(self.bias_k, self.bias_v)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        incremental_state: IncrementalState | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: AttentionMask | None = None,
        rel_pos: RelativePosition | None = None,
        is_first_step: bool = False,
        *,
        is_causal: bool = False,
        need_weights: NeedWeights | None = None,
        positions: Tensor | None = None,
        split_position: SplitArgument | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: ``(B, T, E)``, or ``(T, E)``: then all shapes here are without their batch.
            key: ``(B, N, kdim)``. None in a cross-attention whose state has the keys.
            value: ``(B, N, vdim)``, or None with the key.
            incremental_state: A dict, empty at first, or a cache from `zeta.caches`; it is written
                to. Queries and keys are the tokens after those it holds. A cross-attention keeps
                there the keys and values of its first call, and reuses them.
            key_padding_mask: ``(B, N)``, or ``(B, S)`` with those in the cache, which otherwise
                remembers what it was given. bool, True hides the key; floating point is added to
                the scores.
            attn_mask: ``(T, S)``, ``(B, T, S)``, ``(B * H, T, S)`` or ``(1 or B, 1 or H, T, S)``;
                or a value of `zeta.masks`. bool, True hides the key; floating point is added to the
                scores and gets its gradient.
            rel_pos: ``(B * H, T, S)``, ``(H, T, S)`` or ``(1 or B, H, T, S)``; or never made a
                tensor: a `RelativePositionBias`, an `ALiBi` or a value of `zeta.biases`.
            is_first_step: Accepted for compatibility; the cache knows. An error beside a state that
                holds tokens.
            is_causal: Hide from a query the keys after it.
            need_weights: ``"lazy"``: computed when first used; True: computed now; ``"mean"``:
                averaged over heads; False: None. The constructor's by default.
            positions: Integers ``(T,)`` or ``(1 or B, T)``: where the tokens stand, for the
                rotation and the split of multiway. In a self-attention also those of the keys, then
                as many. By default they follow those in the cache. Masks and biases go by the order
                of tokens regardless.
            split_position: See `Split`; in a cross-attention possibly a pair, queries' and keys'.

        Returns:
            ``(B, T, E)``, and ``(H, B, T, S)``, weights after the softmax and before dropout; with
            ``"mean"`` ``(B, T, S)``. A query with every key hidden gets weights of 0. S counts the
            keys of ``add_bias_kv`` and ``add_zero_attn``, at the end, in this order.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: A shape or a device is wrong, or arguments contradict each other.
        """
        checks.check_tensors(query, key, value, key_padding_mask)
        if query.dim() == 2:
            return self._unbatched(
                query, (key, value), incremental_state, key_padding_mask, attn_mask, rel_pos,
                is_first_step, is_causal=is_causal, need_weights=need_weights,
                positions=positions, split_position=split_position,
            )  # fmt: skip
        checks.check_query(query, self.embed_dim)
        need_weights = self.need_weights if need_weights is None else need_weights
        checks.check_options(need_weights, is_causal)
        cache = None
        if incremental_state is not None:
            cache = open_state(
                incremental_state, self.encoder_decoder_attention, is_first_step, self.xpos
            )
        place = Placement.of(
            query, cache, positions, split_position,
            multiway=self.multiway, rotates=self.xpos is not None,
            key=key, keys_too=self.self_attention,
        )  # fmt: skip
        # Straight from the dict: `nn.Module.__getattr__` adds up where a step takes microseconds.
        parts: dict[str, Any] = self._modules
        projected = self._projected(query, key, value, place)
        query_BHTD = self._heads(
            "query", parts["q_proj"], self.q_norm, query, place.query_route, projected[0]
        )
        extra = self._extra_keys(query_BHTD) if self.num_extra_keys else None
        if isinstance(cache, CrossCache) and cache.length:
            cached, blocks = self._reused(query_BHTD, key, key_padding_mask, cache), None
        else:
            query_BHTD, cached, blocks = self._remember(
                query_BHTD, key, value, key_padding_mask, cache, place, projected[1:]
            )
        try:
            call = attention_call(
                query_BHTD, cached, attn_mask=attn_mask, rel_pos=rel_pos, is_causal=is_causal,
                window=self.window, scale=self.scale,
                dropout_p=self.dropout if self.training else 0.0,
            )  # fmt: skip
            keys: Blocks | ExtraKeys | None = blocks if extra is None else extra.beside(blocks)
            out_BHTD, weights = attend(call, need_weights, keys)
            out_BTE = self._joined(out_BHTD, place.query_route)
        except BaseException:
            if cache is not None:
                cache.take_back()
            raise
        if self.multiway and isinstance(cache, CrossCache):
            cache.count_queries(query)
        return out_BTE, weights

    if TYPE_CHECKING:
        # Of `nn.Module` a checker only learns that it returns something.
        __call__ = forward

    def _projected(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, place: Placement
    ) -> Sequence[Tensor | None]:
        """Queries, keys and values of a few tokens in heads, as far as one pass makes them; or
        None.
        """
        found = None
        if place.query_route is None:
            parts: dict[str, Any] = self._modules
            modules = [parts["q_proj"]]
            if key is query and value is query and self.kdim == self.vdim == self.embed_dim:
                modules += parts["k_proj"], parts["v_proj"]
            found = project_heads(query, modules, self.head_dim)
        return (*(found or ()), None, None, None)[:3]

    def _heads(
        self,
        name: str,
        projection: nn.Module,
        norm: nn.Module | None,
        x: Tensor,
        route: Route | None,
        projected: Tensor | None,
    ) -> Tensor:
        """Tokens ``(B, L, features)`` projected, in heads, normalised: ``(B, heads, L, D)``."""
        if projected is None:
            batch, length, _ = x.shape
            try:
                projected_BLF = through(projection, x, route)
            except RuntimeError:
                checks.check_projected(name, x, projection)
                raise
            heads_BLHD = projected_BLF.view(batch, length, -1, self.head_dim)
        elif norm is None:
            return projected
        else:
            heads_BLHD = projected.transpose(1, 2)
        if norm is not None:
            heads_BLHD = norm(heads_BLHD)
        return heads_BLHD.transpose(1, 2)

    def _joined(self, out_BHTD: Tensor, route: Route | None) -> Tensor:
        """The heads next to each other, normalised, projected: ``(B, T, E)``."""
        out_BTE = out_BHTD.transpose(1, 2).flatten(2)
        if self.inner_attn_ln is not None:
            out_BTE = through(self.inner_attn_ln, out_BTE, route)
        projection: nn.Module = self._modules["out_proj"]  # type: ignore[assignment]  # never None
        return (
            project(out_BTE, projection) if route is None else through(projection, out_BTE, route)
        )

    def _extra_keys(self, query_BHTD: Tensor) -> ExtraKeys:
        """The module's own keys, for queries before their rotation: these have no position."""
        return ExtraKeys(query_BHTD, self.bias_k, self.bias_v, self.add_zero_attn)

    def _reused(
        self,
        query_BHTD: Tensor,
        key: Tensor | None,
        key_padding_mask: Tensor | None,
        cache: CrossCache,
    ) -> Cached:
        """Keys and values that a cross-attention has kept."""
        source = None if key is None else key.shape[1]
        cached = cache.reuse(query_BHTD.shape[0], source, key_padding_mask)
        checks.check_reused(cached, query_BHTD, self.num_kv_heads)
        return cached

    def _remember(
        self,
        query_BHTD: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None,
        cache: Cache | CrossCache | None,
        place: Placement,
        projected: Sequence[Tensor | None],
    ) -> tuple[Tensor, Cached, Blocks | None]:
        """The queries, rotated, and all keys and values, those in the cache first."""
        key, value = checks.checked_source(query_BHTD.shape[0], key, value, self.kdim, self.vdim)
        parts: dict[str, Any] = self._modules
        route = place.key_route
        key_BGND = self._heads("key", parts["k_proj"], self.k_norm, key, route, projected[0])
        value_BGND = self._heads("value", parts["v_proj"], None, value, route, projected[1])
        if isinstance(cache, CrossCache):
            return query_BHTD, cache.update(key_BGND, value_BGND, key_padding_mask), None
        origin, blocks = None, None
        if self.xpos is not None:
            query_BHTD, key_BGND, origin, blocks = place.rotate(
                self.xpos, query_BHTD, key_BGND, cache, keys_too=self.self_attention
            )
        if cache is None:
            cached = uncached(key_BGND, value_BGND, key_padding_mask)
        else:
            cached = cache.update(key_BGND, value_BGND, key_padding_mask, origin=origin)
        return query_BHTD, cached, blocks

    def _unbatched(
        self,
        query: Tensor,
        source: tuple[Tensor | None, Tensor | None],
        incremental_state: IncrementalState | None,
        key_padding_mask: Tensor | None,
        *arguments: Any,
        split_position: SplitArgument | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` of one sequence, with a batch dimension added and taken away."""
        key, value = (None if part is None else part.unsqueeze(0) for part in source)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        # Not `self.forward`: that of a subclass, or in its place, is the one that has come here.
        out, weights = MultiheadAttention.forward(
            self, query.unsqueeze(0), key, value, incremental_state, key_padding_mask, *arguments,
            split_position=batched_split(split_position), **options,
        )  # fmt: skip
        return out.squeeze(0), None if weights is None else without_batch(weights)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the submodules."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, dropout={self.dropout}"
        )
