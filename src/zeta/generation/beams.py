"""Beam search: the likeliest continuations that a bounded number of hypotheses leads to.

Shapes: B sequences of the prompt, K beams, N new tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from zeta.caches import DecodingCache
from zeta.generation.bars import with_bar
from zeta.generation.checks import check_choice, check_fill, check_int, stops_of
from zeta.generation.choosing import relative
from zeta.generation.prompts import Model, Prompt, step
from zeta.values import check_flag, check_number

_HOST = torch.device("cpu")
"""Where hypotheses are kept, whatever the default device."""


class Beams(NamedTuple):
    """The best continuations of each sequence, the best first.

    Attributes:
        tokens: ``(B, K, N)`` int64, stop tokens included, then ``fill``.
        lengths: ``(B, K)`` int64; 0 where there are fewer than ``K`` continuations.
        scores: ``(B, K)`` float64, log-probability divided by ``length ** length_penalty``; -inf
            where there is no continuation.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor


class _Finished(NamedTuple):
    score: float
    tokens: tuple[int, ...]


def beam_search(
    model: Model,
    prompt: Tensor,
    caches: Sequence[DecodingCache],
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    padding: Tensor | None = None,
    stop_tokens: Collection[int] = (),
    prefill_chunk: int | None = None,
    fill: int = 0,
    progress: bool = False,
) -> Beams:
    """Search for the likeliest continuations of each sequence of a prompt.

    At each step the ``num_beams`` best hypotheses that have not stopped go on; one that gets a stop
    token, or ``max_new_tokens`` tokens, is finished. A sequence's search is over when no hypothesis
    of it could still finish among the ``num_beams`` best.

    Args:
        num_beams: ``K``.
        length_penalty: A finished hypothesis is judged by its log-probability divided by ``length
            ** length_penalty``: 0 favours short ones, larger values longer ones.
        fill: What stands behind the end of a continuation.
        progress: As in `generate`; an early end makes fewer steps.
        model, prompt, caches, max_new_tokens, padding, stop_tokens, prefill_chunk: As in `stream`.

    Returns:
        `Beams`, without the prompt.

    Raises:
        ImportError: ``progress`` was asked for, and tqdm is not installed.
        ValueError, TypeError: As `stream`; also if ``num_beams`` is below 1 or ``length_penalty``
            below 0, infinite or no number.
    """
    num_beams = check_int("num_beams", num_beams, 1)
    max_new_tokens = check_int("max_new_tokens", max_new_tokens, 1)
    check_fill(fill)
    check_number("length_penalty", length_penalty)
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty must be finite and not negative; got {length_penalty}")
    check_flag("progress", progress)
    stops, read = stops_of(stop_tokens), Prompt(prompt, padding)
    begin = partial(_Search, len(prompt), num_beams, max_new_tokens, length_penalty)
    steps = _steps(begin, stops, read, model, caches, prefill_chunk, progress)
    *_, search = with_bar(steps, max_new_tokens) if progress else steps
    return search.result(fill, prompt.device)


def _steps(
    begin: Callable[[list[int]], "_Search"],
    stops: list[int],
    prompt: Prompt,
    model: Model,
    caches: Sequence[DecodingCache],
    prefill_chunk: int | None,
    progress: bool,
) -> Iterator["_Search"]:
    """The search after each token; ``begin`` makes it of the stop tokens."""
    logits_BV = prompt.read(model, caches, prefill_chunk, progress=progress)
    # No token can be one outside of the vocabulary.
    search = begin([token for token in stops if 0 <= token < logits_BV.shape[-1]])
    logits = logits_BV[:, None]
    position_B1 = prompt.positions_BT[:, -1:]
    while True:
        source_M, token_M = search.advance(logits)
        yield search
        if not len(source_M):
            return
        source_M, token_M = source_M.to(position_B1.device), token_M.to(position_B1.device)
        with torch.no_grad():
            for cache in caches:
                cache.select(source_M)
        position_B1 = position_B1[source_M] + 1
        flat = step(model, token_M[:, None], caches, position_B1)
        logits = flat.unflatten(0, (len(search.going), -1))


class _Search:
    """The hypotheses of all sequences.

    Attributes:
        going: The sequences whose search is not over, in the order of the batch; each has the same
            number of hypotheses there.
    """

    def __init__(
        self, batch: int, num_beams: int, longest: int, length_penalty: float, stops: list[int]
    ) -> None:
        self.going = list(range(batch))
        self._num_beams, self._longest = num_beams, longest
        self._length_penalty, self._stops = length_penalty, stops
        self._finished: list[list[_Finished]] = [[] for _ in range(batch)]
        # Of each sequence that goes on: its hypotheses, and their log-probabilities.
        self._tokens: list[list[tuple[int, ...]]] = [[()] for _ in range(batch)]
        self._sums = torch.zeros(batch, 1, dtype=torch.float64, device=_HOST)

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add a token to every hypothesis.

        Args:
            logits: ``(len(going), hypotheses, V)``.

        Returns:
            For the next call of the model: which rows of the batch go on, and with which token.

        Raises:
            ValueError: No token can be chosen.
        """
        width, vocabulary = logits.shape[1:]
        log_probability = relative(logits).log_softmax(-1).cpu()
        check_choice(bool(log_probability.isnan().any()), logits, len(self._tokens[0][0]))
        totals = self._sums[..., None] + log_probability
        self._stop(totals)
        totals[..., self._stops] = float("-inf")
        best, at = totals.flatten(1).topk(min(self._num_beams, width * vocabulary), dim=-1)
        sources, going, tokens, sums = [], [], [], []
        for place, sequence in enumerate(self.going):
            kept: list[tuple[float, int, tuple[int, ...]]] = []
            for total, index in zip(best[place].tolist(), at[place].tolist(), strict=True):
                source, token = divmod(index, vocabulary)
                hypothesis = (*self._tokens[place][source], token)
                if len(hypothesis) == self._longest:
                    self._finish(sequence, total, hypothesis)
                elif total > float("-inf"):
                    kept.append((total, place * width + source, hypothesis))
            if kept and not self._is_over(sequence, kept[0][0]):
                going.append(sequence)
                sources.append([source for _, source, _ in kept])
                tokens.append([hypothesis for _, _, hypothesis in kept])
                sums.append([total for total, _, _ in kept])
        self.going, self._tokens = going, tokens
        self._pad(sources, sums)
        self._sums = torch.tensor(sums, dtype=torch.float64, device=_HOST)
        last = [hypothesis[-1] for hypotheses in self._tokens for hypothesis in hypotheses]
        flat = [source for row in sources for source in row]
        return _indices(flat), _indices(last)

    def _stop(self, totals: Tensor) -> None:
        """Finish every hypothesis with every stop token."""
        for place, sequence in enumerate(self.going):
            found = totals[place, :, self._stops].tolist()
            for hypothesis, row in zip(self._tokens[place], found, strict=True):
                for token, total in zip(self._stops, row, strict=True):
                    if total > -math.inf:
                        self._finish(sequence, total, (*hypothesis, token))

    def _pad(self, sources: list[list[int]], sums: list[list[float]]) -> None:
        """Give every sequence as many hypotheses, impossible ones where there are fewer."""
        width = max(map(len, sums), default=0)
        for source, hypotheses, total in zip(sources, self._tokens, sums, strict=True):
            missing = width - len(total)
            source += source[:1] * missing
            hypotheses += hypotheses[:1] * missing
            total += [float("-inf")] * missing

    def _finish(self, sequence: int, total: float, hypothesis: tuple[int, ...]) -> None:
        if not total > float("-inf"):
            return
        finished = self._finished[sequence]
        finished.append(_Finished(self._score(total, len(hypothesis)), hypothesis))
        finished.sort(key=lambda found: -found.score)
        del finished[self._num_beams :]

    def _is_over(self, sequence: int, best: float) -> bool:
        """Whether nothing that goes on can still be among the best.

        Log-probabilities only fall, so the best that is possible is the present one, judged at the
        greatest length.
        """
        finished = self._finished[sequence]
        if len(finished) < self._num_beams:
            return False
        return finished[-1].score >= self._score(best, self._longest)

    def _score(self, total: float, length: int) -> float:
        try:
            return total / math.pow(length, self._length_penalty)
        except OverflowError:
            return 0.0

    def result(self, fill: int, device: torch.device) -> Beams:
        """The finished hypotheses as tensors."""
        batch, width = len(self._finished), self._num_beams
        longest = max((len(found.tokens) for row in self._finished for found in row), default=0)
        tokens = torch.full((batch, width, longest), fill, dtype=torch.int64, device=_HOST)
        lengths = torch.zeros(batch, width, dtype=torch.int64, device=_HOST)
        scores = torch.full((batch, width), -math.inf, dtype=torch.float64, device=_HOST)
        for b, finished in enumerate(self._finished):
            for k, found in enumerate(finished):
                tokens[b, k, : len(found.tokens)] = _indices(found.tokens)
                lengths[b, k] = len(found.tokens)
                scores[b, k] = found.score
        return Beams(tokens.to(device), lengths.to(device), scores.to(device))


def _indices(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=_HOST)
