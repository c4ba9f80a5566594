"""Generation of one continuation a prompt: `stream` and `generate`.

Shapes: B sequences of the prompt, R of them that still go on, T prompt length, N new tokens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zeta.caches import DecodingCache
from zeta.generation.choosing import Choice, Greedy
from zeta.generation.prompts import Model, Prompt, step


class Step(NamedTuple):
    """One new token of each sequence that still goes on.

    Attributes:
        number: 0 for the first new token.
        rows: ``(R,)`` int64, which sequences of the prompt.
        tokens: ``(R,)`` int64.
        stopped: ``(R,)`` bool, True where the token is a stop token: the sequence ends with it.
    """

    number: int
    rows: Tensor
    tokens: Tensor
    stopped: Tensor


class Generated(NamedTuple):
    """Continuations.

    Attributes:
        tokens: ``(B, N)`` int64, stop tokens included, then ``fill``.
        lengths: ``(B,)`` int64, the number of tokens of each before the fill.
    """

    tokens: Tensor
    lengths: Tensor


def stream(
    model: Model,
    prompt: Tensor,
    caches: Sequence[DecodingCache],
    *,
    max_new_tokens: int,
    padding: Tensor | None = None,
    choose: Choice | None = None,
    stop_tokens: Collection[int] = (),
    prefill_chunk: int | None = None,
) -> Iterator[Step]:
    """Continue each sequence of a prompt, token by token.

    A sequence that has got a stop token leaves the batch, and its place in the caches is free.
    Without gradients; the model should be in evaluation mode.

    Args:
        model: See `Model`.
        prompt: ``(B, T)`` int64.
        caches: Empty ones, as many as the model wants.
        max_new_tokens: The longest continuation.
        padding: ``(B, T)`` bool, True for padding, at the left or the right of each sequence. The
            continuation is the one of the sequence alone.
        choose: `Greedy`, the default, or `Sampling`.
        stop_tokens: A sequence ends with the first of these.
        prefill_chunk: Tokens of the prompt that are shown to the model at once; all by default.

    Yields:
        A `Step` for each new token. Stop listening, and nothing more is computed.

    Raises:
        ValueError: An argument has the wrong shape or range.
        TypeError: An argument has the wrong dtype.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    read = Prompt(prompt, padding)
    logits_RV = read.read(model, caches, prefill_chunk)
    choosing = (choose or Greedy()).start(read.tokens_BT, read.real_BT)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=prompt.device)
    rows_R = torch.arange(len(prompt), device=prompt.device)
    position_R = read.positions_BT[:, -1]
    for number in range(max_new_tokens):
        token_R = choosing(logits_RV, rows_R)
        stopped_R = torch.isin(token_R, stops)
        yield Step(number, rows_R, token_R, stopped_R)
        going_R = ~stopped_R
        if number + 1 == max_new_tokens or not bool(going_R.any()):
            return
        if bool(stopped_R.any()):
            rows_R, token_R = rows_R[going_R], token_R[going_R]
            position_R = position_R[going_R]
            with torch.no_grad():
                for cache in caches:
                    cache.select(going_R)
        position_R = position_R + 1
        logits_RV = step(model, token_R[:, None], caches, position_R[:, None])


def generate(
    model: Model,
    prompt: Tensor,
    caches: Sequence[DecodingCache],
    *,
    max_new_tokens: int,
    padding: Tensor | None = None,
    choose: Choice | None = None,
    stop_tokens: Collection[int] = (),
    prefill_chunk: int | None = None,
    on_step: Callable[[Step], object] | None = None,
    fill: int = 0,
) -> Generated:
    """`stream` to its end.

    Args:
        on_step: Called with each `Step`, as for a progress bar.
        fill: What stands behind the end of a continuation that is shorter than the longest.
        model, prompt, caches, max_new_tokens, padding, choose, stop_tokens, prefill_chunk: As in
            `stream`.

    Returns:
        `Generated` tokens, without the prompt.

    Raises:
        ValueError, TypeError: As `stream`.
    """
    batch = len(prompt)
    columns = []
    lengths_B = torch.zeros(batch, dtype=torch.int64, device=prompt.device)
    for now in stream(
        model,
        prompt,
        caches,
        max_new_tokens=max_new_tokens,
        padding=padding,
        choose=choose,
        stop_tokens=stop_tokens,
        prefill_chunk=prefill_chunk,
    ):
        column_B = torch.full((batch,), fill, dtype=torch.int64, device=prompt.device)
        column_B[now.rows] = now.tokens
        lengths_B[now.rows] += 1
        columns.append(column_B)
        if on_step is not None:
            on_step(now)
    return Generated(torch.stack(columns, dim=1), lengths_B)
