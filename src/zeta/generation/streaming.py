"""Generation of one continuation a prompt: `stream` and `generate`.

Shapes: B sequences of the prompt, R of them that still go on, T prompt length, N new tokens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zeta.caches import DecodingCache
from zeta.generation.bars import with_bar
from zeta.generation.checks import (
    check_choice,
    check_fill,
    check_int,
    has_no_token,
    stops_of,
)
from zeta.generation.choosing import Choice, Greedy
from zeta.generation.drawing import Uniforms, draw
from zeta.generation.prompts import Model, Prompt, step
from zeta.generation.speculation import Draft, Speculation, check_draft
from zeta.values import check_flag, check_tensor


class Step(NamedTuple):
    """One new token of each sequence that still goes on.

    The tensors are the generation's own, which goes on from them: copy one before it is changed.

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
    draft: Draft | None = None,
    progress: bool = False,
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
            continuation is the one of the sequence alone. None with a `RollingCache` that has
            sinks.
        choose: `Greedy`, the default, or `Sampling`.
        stop_tokens: A sequence ends with the first of these.
        prefill_chunk: Tokens of the prompt that are shown to the model at once; all by default.
        draft: A cheaper model that proposes tokens; see `Draft`. It goes without a repetition
            penalty.
        progress: Draw a bar on the standard error while the chunks of a prompt are read; a library
            is silent unless asked. Needs tqdm: ``pip install 'zeta-attention[demo]'``.

    Yields:
        A `Step` for each new token. Stop listening, and nothing more is computed.

    Raises:
        ValueError: An argument has the wrong shape or range, or the model returns logits of which
            no token can be chosen: NaN, or -inf for all.
        TypeError: An argument has the wrong type or dtype.
        ImportError: ``progress`` was asked for, and tqdm is not installed.
    """
    check_flag("progress", progress)
    max_new_tokens = check_int("max_new_tokens", max_new_tokens, 1)
    choice = _choice(choose, with_draft=draft is not None)
    if draft is not None:
        check_draft(draft, caches)
        if choice.repetition_penalty != 1.0:
            raise ValueError("draft goes without a repetition penalty; got one")
    read = Prompt(prompt, padding)
    stops = torch.tensor(stops_of(stop_tokens), dtype=torch.int64, device=prompt.device)
    logits_RV = read.read(model, caches, prefill_chunk, progress=progress)
    if draft is not None:
        draft_logits = read.read(draft.model, draft.caches, prefill_chunk, progress=progress)
        if draft_logits.shape != logits_RV.shape:
            raise ValueError(
                f"the draft must have the model's vocabulary, {logits_RV.shape[-1]}; "
                f"got {draft_logits.shape[-1]}"
            )
        yield from _speculate(model, read, caches, logits_RV, max_new_tokens, choice, stops, draft)
        return
    choosing = choice.start(read.tokens_BT, read.real_BT)
    rows_R = torch.arange(len(prompt), device=prompt.device)
    position_R = read.positions_BT[:, -1]
    for number in range(max_new_tokens):
        token_R = choosing(logits_RV, rows_R)
        stopped_R = torch.isin(token_R, stops)
        # All that the host must know, in one look at the device.
        facts = has_no_token(logits_RV).any(), stopped_R.any(), stopped_R.all()
        is_none, any_stopped, all_stopped = torch.stack(facts).tolist()
        check_choice(is_none, logits_RV, number)
        yield Step(number, rows_R, token_R, stopped_R)
        if number + 1 == max_new_tokens or all_stopped:
            return
        if any_stopped:
            going_R = ~stopped_R
            rows_R, token_R = rows_R[going_R], token_R[going_R]
            position_R = position_R[going_R]
            _keep(caches, going_R)
        position_R = position_R + 1
        logits_RV = step(model, token_R[:, None], caches, position_R[:, None])


def _choice(choose: Choice | None, *, with_draft: bool) -> Choice:
    if choose is None:
        return Greedy()
    needed = ("repetition_penalty", "seed", "probabilities") if with_draft else ("start",)
    missing = [name for name in needed if not hasattr(choose, name)]
    if isinstance(choose, type) or missing:
        raise TypeError(
            "choose must be Greedy() or Sampling(), or be like them, with "
            f"{', '.join(needed)}; got {choose!r}"
        )
    return choose


def _speculate(
    model: Model,
    read: Prompt,
    caches: Sequence[DecodingCache],
    logits_BV: Tensor,
    max_new_tokens: int,
    choice: Choice,
    stops: Tensor,
    draft: Draft,
) -> Iterator[Step]:
    """`stream` with a draft, once both models have read the prompt."""
    rows_R = torch.arange(len(logits_BV), device=stops.device)
    uniforms = Uniforms(choice.seed)
    speculation = Speculation(model, caches, draft, choice.probabilities, uniforms)
    position_R = read.positions_BT[:, -1]
    recent = read.tokens_BT[:, -1:]
    check_choice(bool(has_no_token(logits_BV).any()), logits_BV, 0)
    new = draw(choice.probabilities(logits_BV), uniforms(rows_R))[:, None]
    number = 0
    while True:
        going_R, all_go = torch.ones_like(rows_R, dtype=torch.bool), True
        for token_R in new.unbind(1):
            stopped_R = torch.isin(token_R, stops)
            shown = rows_R, token_R, stopped_R
            # To choose by a mask waits for the device.
            yield Step(number, *(shown if all_go else (part[going_R] for part in shown)))
            going_R = going_R & ~stopped_R
            number += 1
            num_going = int(going_R.sum())
            if number == max_new_tokens or not num_going:
                return
            all_go = num_going == len(going_R)
        recent = torch.cat((recent, new), dim=1)[:, -2:]
        position_R = position_R + new.shape[1]
        if not all_go:
            recent, position_R, rows_R = recent[going_R], position_R[going_R], rows_R[going_R]
            _keep((*caches, *draft.caches), going_R)
        new = speculation.advance(recent, position_R, rows_R, number, max_new_tokens - number)


@torch.no_grad()
def _keep(caches: Sequence[DecodingCache], going_R: Tensor) -> None:
    for cache in caches:
        cache.select(going_R)


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
    draft: Draft | None = None,
    on_step: Callable[[Step], object] | None = None,
    fill: int = 0,
    progress: bool = False,
) -> Generated:
    """`stream` to its end.

    Args:
        on_step: Called with each `Step`.
        fill: What stands behind the end of a continuation that is shorter than the longest.
        progress: As in `stream`, and then a bar of the steps.
        model, prompt, caches, max_new_tokens, padding, choose, stop_tokens, prefill_chunk, draft:
            As in `stream`.

    Returns:
        `Generated` tokens, without the prompt.

    Raises:
        ValueError, TypeError: As `stream`.
        ImportError: ``progress`` was asked for, and tqdm is not installed.
    """
    check_tensor("prompt", prompt)
    check_fill(fill)
    check_flag("progress", progress)
    columns = []
    # Of one of another shape, which `stream` refuses.
    batch = prompt.shape[:1]
    lengths_B = torch.zeros(batch, dtype=torch.int64, device=prompt.device)
    steps = stream(
        model,
        prompt,
        caches,
        max_new_tokens=max_new_tokens,
        padding=padding,
        choose=choose,
        stop_tokens=stop_tokens,
        prefill_chunk=prefill_chunk,
        draft=draft,
        progress=progress,
    )
    for now in with_bar(steps, max_new_tokens) if progress else steps:
        column_B = torch.full(batch, fill, dtype=torch.int64, device=prompt.device)
        column_B[now.rows] = now.tokens
        lengths_B[now.rows] += 1
        columns.append(column_B)
        if on_step is not None:
            on_step(now)
    return Generated(torch.stack(columns, dim=1), lengths_B)
