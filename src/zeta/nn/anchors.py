"""xPos at any distance: keys and queries that count their decay from an anchor near by.

From one fixed anchor the scale of xPos overflows some tens of thousands of positions on. So tokens
are numbered in the order in which they come, a block of numbers shares an anchor, and a key is kept
about the anchor of its block, for ever. Queries meet keys about one anchor. The scales of two
anchors differ by powers of two, so that to bring tokens from one to another changes no digit; what
becomes too small to be represented has decayed to nothing.

Queries of one block, those of a decoding step, are brought to the anchor of each block of keys in
turn, and what they find there is merged by the log-sum-exp: the keys are read where they are. For
that the blocks must be slices of the keys, at places known to the host. Keys with positions of
their own (a rolling window, pages of sequences that differ in length, a recorded `StaticCache`) and
those of queries of several blocks, a chunk's, are copied to the anchor of the last query instead.

Shapes: B batch, H heads, G key heads, T queries, S keys, L tokens, D head dimension.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from zeta.caches import Cache
from zeta.caches.recording import is_recorded
from zeta.nn.positions import XPos
from zeta.nn.tables import Positions, last_positions, position_tensor
from zeta.ops.attention import run, run_weights
from zeta.ops.call import AttentionCall
from zeta.ops.parts import Indivisible, keys_of, rows_of
from zeta.transforms import is_traced

_SHARE = 4
"""Of the reach of xPos, a block extends over half of this part at each side of its anchor: room for
features larger than 1, and for the block before."""


class Blocks(NamedTuple):
    """How a call's tokens are anchored: number ``n`` about the multiple of ``2 * half`` next to it.

    Attributes:
        rotation: Of the queries and keys.
        half: Half the length of a block.
    """

    rotation: XPos
    half: int

    @classmethod
    def of(cls, rotation: XPos, dtype: torch.dtype, *, even: bool = False) -> "Blocks":
        """The longest blocks for a dtype; with ``even`` those in which no key is scaled by more
        than 2."""
        half = rotation.reach(dtype) // _SHARE
        return cls(rotation, max(1, min(half, int(rotation.scale_base / 2)) if even else half))

    def anchors(self, numbers: Tensor) -> Tensor:
        """The anchor of each token, of the shape of their numbers."""
        block = (numbers.clamp(min=0) + self.half) // (2 * self.half)
        return block * (2 * self.half)

    def run(self, call: AttentionCall) -> Tensor:
        """The attention of queries and keys that are about the anchors of their own blocks.

        Raises:
            ValueError: More queries than half a block see keys after them.
        """
        return self.run_with_lse(call)[0]

    def run_with_lse(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """`run`, and ``(B, H, T)``, the log-sum-exp, where ``call.result`` asks for it.

        That of a query with every key hidden is -inf, or the least finite number.
        """
        parts = self._key_blocks(call)
        if parts is None:
            outs, lses = zip(*[run(part) for part in self._parts(call)], strict=True)
            # Of parts that do not ask for it, some backends return it and others do not.
            lse = torch.cat(lses, dim=2) if call.result == "lse" else None
            return torch.cat(outs, dim=2), lse
        results = (
            run(dataclasses.replace(part, query=_times(call.query, factor_D)))
            for part, factor_D in parts
        )
        return next(results) if len(parts) == 1 else _merged(results)

    def weights(self, call: AttentionCall) -> Tensor:
        """Of such an attention, or some of its queries in any order, what ``call.result`` asks
        for."""
        number_T = call.query_positions
        if number_T is None or is_traced() or is_recorded(number_T.device):
            parts = self._parts(call)
        elif _sees_later(call):
            parts = iter((self._about_one_anchor(call, _last_number(call)),))
        elif bool((number_T.diff() == 1).all()):
            parts = self._parts(call)
        else:
            return self._weights_by_block(call, self.anchors(number_T))
        return torch.cat([run_weights(part) for part in parts], dim=-2)

    def _weights_by_block(self, call: AttentionCall, anchor_T: Tensor) -> Tensor:
        _, group_T = anchor_T.unique(dim=1, return_inverse=True)
        order_T = group_T.argsort(stable=True)
        found = [
            run_weights(self._about_one_anchor(rows_of(call, rows)))
            for rows in order_T.split(group_T.bincount().tolist())
        ]
        return torch.cat(found, dim=-2)[..., order_T.argsort(), :]

    def _key_blocks(self, call: AttentionCall) -> list[tuple[AttentionCall, Tensor]] | None:
        """The call over each block of keys, and the factors ``(D,)`` that bring the queries there.

        None where the queries are of several blocks, or those of the keys are no slices. Blocks in
        which no query sees a key are left out, but for one.
        """
        if call.has_positions:
            return None
        first, last = max(call.source - call.target, 0), call.source - 1
        own = self._block(last)
        if self._block(first) != own:
            return None
        lowest, highest = (None, None) if call.mask is None else call.mask.key_bounds(first, last)
        end = own if highest is None else self._block(max(0, min(highest, last)))
        start = 0 if lowest is None else min(self._block(max(0, lowest)), end)
        anchors = torch.arange(start, own + 1, device=call.query.device) * (2 * self.half)
        exponents = self._exponents(anchors)
        factors = _powers_of_two(exponents[-1] - exponents, call.query.dtype).unbind()
        one = dataclasses.replace(call, result=call.result if start == end else "lse")
        rest = one if call.sinks is None else dataclasses.replace(one, sinks=None)
        parts = []
        try:
            for block in range(start, end + 1):
                middle = block * 2 * self.half
                keys = slice(max(middle - self.half, 0), min(middle + self.half, call.source))
                part = keys_of(one if block == start else rest, keys)
                parts.append((part, factors[block - start]))
        except Indivisible:
            return None
        return parts

    def _block(self, number: int) -> int:
        return (number + self.half) // (2 * self.half)

    def _parts(self, call: AttentionCall) -> Iterator[AttentionCall]:
        # Of queries that see later keys none can be far from the anchor of those.
        sees_later = _sees_later(call)
        if call.target <= (2 * self.half if sees_later else self.half):
            yield self._about_one_anchor(call)
            return
        if sees_later:
            raise ValueError(
                f"xPos in {call.query.dtype} over more than {2 * self.half} queries with a cache, "
                f"or {2 * self.rotation.reach(call.query.dtype)} without, needs is_causal=True or "
                f"a window: later keys would grow beyond all bounds; got {call.target}"
            )
        for start in range(0, call.target, self.half):
            rows = slice(start, min(start + self.half, call.target))
            yield self._about_one_anchor(_rows_of(call, rows))

    def _about_one_anchor(self, call: AttentionCall, last: Tensor | None = None) -> AttentionCall:
        """The call about the anchor of the token ``last``, ``(1 or B, 1)``, or its last query."""
        device = call.query.device
        number_T = call.query_positions
        if number_T is None:
            number_T = torch.arange(call.source - call.target, call.source, device=device)[None]
        own_T = self.anchors(number_T)
        anchor = own_T[:, -1:] if last is None else self.anchors(last)
        query = _times_two_to(call.query, self._exponents(own_T) - self._exponents(anchor))
        key = self._keys_about(anchor, call)
        value = key if call.value is call.key else call.value
        return dataclasses.replace(call, query=query, key=key, value=value)

    def _keys_about(self, anchor: Tensor, call: AttentionCall) -> Tensor:
        wanted = self._exponents(anchor)
        if call.key_positions is not None:
            own = self._exponents(self.anchors(call.key_positions))
            # No query sees the blocks after its own.
            return _times_two_to(call.key, (wanted - own).clamp_(max=0))
        parts = []
        start, own_anchor = 0, 0
        while start < call.source:
            stop = min(own_anchor + self.half, call.source)
            own = self.rotation.exponents(own_anchor, call.key.device)
            part = call.key[:, :, start:stop]
            parts.append(_times_two_to(part, (wanted - own).clamp_(max=0)))
            start, own_anchor = stop, own_anchor + 2 * self.half
        return torch.cat(parts, dim=2)

    def _exponents(self, anchor: Tensor) -> Tensor:
        return self.rotation.exponents(anchor, anchor.device)


class Rotated(NamedTuple):
    """Queries and new keys, rotated.

    Attributes:
        query, key: ``(B, H, T, D)`` and ``(B, G, N, D)``.
        origin: ``(1 or B,)``, to be kept with the keys: the position from which their decay counts;
            None: 0.
        blocks: Whose anchors they have; None: the same anchor as all keys.
    """

    query: Tensor
    key: Tensor
    origin: Tensor | None
    blocks: Blocks | None


def rotate_xpos(
    rotation: XPos,
    query: Tensor,
    key: Tensor,
    cache: Cache | None,
    positions: Positions,
    *,
    given: bool,
) -> Rotated:
    """Rotate the tokens of a self-attention.

    Args:
        rotation: The module's.
        query: ``(B, H, T, D)``, the last of the tokens.
        key: ``(B, G, N, D)``.
        cache: Where the keys will be kept.
        positions: Of the tokens, or of the first.
        given: Whether they came from the caller; otherwise they are the numbers of the tokens.

    Raises:
        ValueError: A position lies too far from where its token stands in the order.
    """
    added, reach = key.shape[2], rotation.reach(key.dtype)
    blocks = Blocks.of(rotation, key.dtype, even=getattr(cache, "wants_even_keys", False))
    first = None
    if given and isinstance(positions, Tensor):
        # The last token is no padding, or is that of a sequence which has ended.
        first = positions.reshape(-1, added).amax(-1) - (added - 1)
    origin = first if cache is None else cache.origin(first)
    anchor: Positions
    if cache is None and added <= 2 * reach:
        # The middle serves the longest sequences.
        anchor, most, needed = added // 2, reach, None
    elif cache is not None and _all_in_first_block(cache, key, blocks):
        anchor, most, needed = 0, 2 * blocks.half, None
    else:
        numbers = torch.arange(added, device=key.device)[None]
        if cache is not None:
            numbers = cache.next_positions(added, key.device)
        anchor, most, needed = blocks.anchors(numbers), 2 * blocks.half, blocks
    if origin is not None and not isinstance(positions, Tensor):
        positions = position_tensor(positions, added, key.device)
    if isinstance(positions, Tensor) and (given or origin is not None):
        _check_distance(positions, origin, anchor, most)
    return _rotated(rotation, query, key, positions, anchor, origin)._replace(blocks=needed)


def rotate_earlier(rotation: XPos, key: Tensor) -> Tensor:
    """Keys ``(B, G, L, D)`` of the first tokens, as they are kept: for those of TorchScale."""
    blocks = Blocks.of(rotation, key.dtype)
    numbers = torch.arange(key.shape[2], device=key.device)
    return rotation.keys(key, numbers, blocks.anchors(numbers))


def _rows_of(call: AttentionCall, rows: slice) -> AttentionCall:
    try:
        return rows_of(call, rows)
    except Indivisible as error:
        raise TypeError(
            f"xPos takes {call.target} queries with a cache in parts, and {error}: "
            "give fewer at once, or a tensor"
        ) from error


def _sees_later(call: AttentionCall) -> bool:
    last = None if call.mask is None else call.mask.key_bounds(0, 0)[1]
    return last is None or last > 0


def _last_number(call: AttentionCall) -> Tensor:
    """The number ``(1 or B, 1)`` of the last key."""
    if call.key_positions is None:
        return torch.full((1, 1), call.source - 1, device=call.key.device)
    return call.key_positions.amax(-1, keepdim=True)


def _all_in_first_block(cache: Cache, key: Tensor, blocks: Blocks) -> bool:
    # A step that is recorded does for every length, which the device alone knows.
    most: int | None = getattr(cache, "max_length", None) if is_recorded(key.device) else None
    return (cache.length + key.shape[2] if most is None else most) <= blocks.half


def _check_distance(positions: Tensor, origin: Tensor | None, anchor: Positions, most: int) -> None:
    if torch.compiler.is_compiling() or positions.device.type != "cpu":
        return
    counted = positions if origin is None else positions - origin[:, None]
    far = ((counted - anchor).abs() > most) & (positions >= 0)
    if bool(far.any()):
        raise ValueError(
            f"positions must follow each other within {most} of the order of the tokens, which is "
            "as far as xPos reaches from an anchor; only negative ones, of padding, may not"
        )


def _rotated(
    rotation: XPos,
    query: Tensor,
    key: Tensor,
    positions: Positions,
    anchor: Positions,
    origin: Tensor | None,
) -> Rotated:
    earlier = key.shape[2] - query.shape[2]
    if not earlier:
        return Rotated(*rotation.both(query, key, positions, anchor, origin), origin, None)
    query_at = last_positions(positions, earlier)
    query_anchor = anchor[..., earlier:] if isinstance(anchor, Tensor) else anchor
    turned = rotation.queries(query, query_at, query_anchor, origin)
    return Rotated(turned, rotation.keys(key, positions, anchor, origin), origin, None)


def _merged(results: Iterator[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, T, Dv)`` and log-sum-exp over all keys, of those over some each."""
    total, total_lse = None, None
    for out, lse in results:
        assert lse is not None
        wide = out.to(lse.dtype)
        # Finite, so that a row without keys makes no inf - inf.
        lse = lse.clamp(min=torch.finfo(lse.dtype).min)
        if total is None or total_lse is None:
            total, total_lse = wide, lse
        else:
            total = torch.lerp(total, wide, (lse - total_lse).sigmoid().unsqueeze(-1))
            total_lse = torch.logaddexp(total_lse, lse)
    assert total is not None
    assert total_lse is not None
    return total.to(out.dtype), total_lse


def _times_two_to(x: Tensor, exponent: Tensor) -> Tensor:
    """``x`` ``(B, H, L, D)``, its pairs times powers of two ``(1 or B, L, D / 2)``."""
    return _times(x, _powers_of_two(exponent, x.dtype).unsqueeze(-3))


def _powers_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``(..., D)``, one for each of a pair, for exponents ``(..., D / 2)``."""
    # Of float16 the powers themselves could be out of range.
    wide = torch.float32 if dtype == torch.float16 else dtype
    return exponent.exp2().to(wide).repeat_interleave(2, dim=-1)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    return (x.to(factor.dtype) * factor).to(x.dtype)
