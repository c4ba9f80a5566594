"""The public functions of the op: check, choose a backend, run.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

import dataclasses

from torch import Tensor

from zeta.biases import Bias
from zeta.masks import Mask
from zeta.ops import backends, plain, stored
from zeta.ops.backends import Backend
from zeta.ops.call import AttentionCall, BackendUnsupported, drawn_seed
from zeta.ops.precision import Precision
from zeta.ops.sinks import attenuate, attenuated_weights, without_sinks


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """Multi-head attention: ``softmax(bias(scale * query . key))`` over visible keys, times values.

    Scores, softmax and sums are in float32 (float64 for float64 inputs). A query with every key
    hidden gets 0, with gradient 0. ``torch.autocast`` casts the operands, as those of torch's own
    attention.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, G, S, D)``, ``H % G == 0``: query head ``h`` reads key head ``h // (H / G)``.
        value: ``(B, G, S, Dv)``.
        mask: What a query may see, from `zeta.masks`; everything by default.
        bias: What is done to the scores, from `zeta.biases`.
        dropout_p: Probability in ``[0, 1)`` that a weight is dropped; the others are scaled by
            ``1 / (1 - dropout_p)``.
        scale: Factor of the scores, ``1 / sqrt(D)`` by default: a number, not a tensor. What is
            learned can be a factor of the query.
        seed: Of the dropout, an int or a 0-d int64 tensor; drawn from torch's generator by default.
            The same seed drops the same weights on every backend of Zeta's own.
        backend: ``"auto"`` takes the first that can; a name takes that one or raises.
        query_positions: ``(T,)`` or ``(1 or B, T)`` int64; by default queries are the last of the
            keys' positions, ``S - T .. S - 1``.
        key_positions: ``(S,)`` or ``(1 or B, S)`` int64, ``0 .. S - 1`` by default. A negative one
            marks an empty slot, which is hidden.
        sinks: ``(H,)`` floating point: a score a head that takes its share in the softmax's
            denominator and adds nothing to the output, as in GPT-OSS. It meets the scores as they
            are after ``bias``. Learned: it gets its gradient. A query with every key hidden still
            gets 0; a sink of -inf takes nothing. Needs the backend's log-sum-exp.
        precision: Of products of float32 on processors with AMX: ``"highest"``, or ``"high"``,
            faster, with errors of about 1e-5. By default as `set_float32_precision` says.

    Returns:
        ``(B, H, T, Dv)`` in the query's dtype.

    Raises:
        ValueError: A shape, a device or a range is wrong.
        TypeError: A type or a dtype is wrong.
        BackendUnsupported: The named backend cannot do this call.
    """
    if dropout_p and seed is None and isinstance(query, Tensor):
        seed = drawn_seed(query.device)
    has_more = query_positions is not None or key_positions is not None or sinks is not None
    if backend == "auto" and not has_more:
        found = plain.attend(query, key, value, mask, bias, scale, precision, dropout_p, seed)
        if found is not None:
            return found
    call = AttentionCall.checked(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
        scale=scale,
        seed=seed,
        query_positions=query_positions,
        key_positions=key_positions,
        sinks=sinks,
        precision=precision,
    )
    return _run_checked(call, backend)[0]


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the natural logarithm of the sum of the exponentials of the scores.

    Two results over disjoint keys can be merged by it. Arguments and errors as `attention`.

    Returns:
        ``(B, H, T, Dv)``, and ``(B, H, T)`` in float32 (float64 for float64 inputs), -inf for a
        query with every key hidden. Both are differentiable. With ``sinks`` it is the logarithm of
        the whole denominator, sink included, and so the sink itself for such a query: weights are
        ``exp(score - lse)``, and results over disjoint keys merge if one call is given the sinks.
    """
    call = AttentionCall.checked(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
        scale=scale,
        seed=seed,
        query_positions=query_positions,
        key_positions=key_positions,
        sinks=sinks,
        precision=precision,
        result="lse",
    )
    out, lse = _run_checked(call, backend)
    assert lse is not None
    return out, lse


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    reduce: str | None = None,
    backend: str = "auto",
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """The weights of `attention`, after the softmax and before dropout; differentiable.

    Args:
        reduce: None for every head; ``"mean"`` averages over heads without holding them all.
        query, key, mask, bias, scale, backend, query_positions, key_positions, sinks, precision: As
            in `attention`.

    Returns:
        ``(B, H, T, S)``, or ``(B, T, S)`` with ``reduce="mean"``, in the query's dtype. Rows sum to
        1, or to 0 where every key is hidden; with ``sinks``, to what the sink leaves.

    Raises:
        ValueError, TypeError, BackendUnsupported: As `attention`.
    """
    if reduce not in (None, "mean"):
        raise ValueError(f"reduce must be None or 'mean'; got {reduce!r}")
    call = AttentionCall.checked(
        query,
        key,
        key,
        mask=mask,
        bias=bias,
        scale=scale,
        query_positions=query_positions,
        key_positions=key_positions,
        sinks=sinks,
        precision=precision,
        result="weights" if reduce is None else "mean_weights",
    )
    return run_weights(call, backend)


def run(call: AttentionCall, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Run a checked call on the named backend, or on the first that can."""
    if backend == "auto" and call.result == "output":
        found = plain.attend_call(call)
        if found is not None:
            return found, None
    return _run_checked(call, backend)


def _run_checked(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor | None]:
    if call.sinks is None:
        return _run(call, backend)
    out, lse = _run(without_sinks(call), backend)
    assert lse is not None
    return attenuate(out, lse, call.sinks)


def _run(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor | None]:
    if stored.is_stored(call):
        found = stored.run(call, backend)
        if found is not None:
            return found
        call = stored.gathered(call)
    return _choose(call, backend).run(call)


def run_weights(call: AttentionCall, backend: str = "auto") -> Tensor:
    """The attention weights of a checked call whose ``result`` asks for them."""
    if stored.is_stored(call):
        call = stored.gathered(call)
    if call.sinks is None:
        return _choose(call, backend).weights(call)
    return attenuated_weights(
        call, lambda part: run(part, backend), lambda part: run_weights(part, backend)
    )


def run_with_weights(
    call: AttentionCall, *, mean: bool, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The output of a checked call and its weights before dropout, each as its own call makes it.

    Args:
        call: Its ``result`` is ``"output"``.
        mean: Average the weights over heads.
        backend: As in `attention`.
    """
    if call.sinks is None and not stored.is_stored(call):
        weigher = backends.weigher(_choose(call, backend))
        found = None if weigher is None else weigher.run_with_weights(call, mean)
        if found is not None:
            return found
    return run(call, backend)[0], run_weights(call.of_weights(mean=mean), backend)


def _choose(call: AttentionCall, backend: str) -> Backend:
    if backend == "auto":
        for name in backends.order(call):
            candidate = backends.load(name)
            if not candidate.unsupported(call):
                return candidate
        raise AssertionError("the reference supports everything")
    chosen = backends.load(backend)
    reasons = chosen.unsupported(call)
    if reasons:
        raise BackendUnsupported(
            f"backend {backend!r} cannot do this call ({call.describe()}):\n"
            + "\n".join(f"- {reason}" for reason in reasons)
        )
    return chosen


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend a call gets, and why each of those that cannot take it does not.

    Attributes:
        backend: The name of the backend that runs.
        reasons: For each backend, in the order in which they are asked, why it cannot do the call;
            an empty tuple if it can.
        call: The call in one line.
        gathered: Why the keys and values that a cache gave back are made into tensors before the
            call runs; empty if they are read where they lie, or are tensors.
    """

    backend: str
    reasons: dict[str, tuple[str, ...]]
    call: str
    gathered: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.backend} runs: {self.call}"]
        lines += [f"  keys and values are gathered first: {reason}" for reason in self.gathered]
        for name, reasons in self.reasons.items():
            can = "chosen" if name == self.backend else "can, but is asked later"
            lines += [f"  {name}: {reason}" for reason in reasons or (can,)]
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    precision: Precision | None = None,
    with_lse: bool = False,
) -> Explanation:
    """What `attention` would do with the same arguments, without running it.

    Args:
        with_lse: Explain `attention_with_lse` instead.
        query, key, value, mask, bias, dropout_p, scale, seed, backend, query_positions,
            key_positions, sinks, precision: As in `attention`.

    Returns:
        An `Explanation`; print it.

    Raises:
        ValueError, TypeError, BackendUnsupported: As `attention`.
    """
    call = AttentionCall.checked(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
        scale=scale,
        # Which one does not matter here, and torch's generator stays as it is.
        seed=0 if seed is None else seed,
        query_positions=query_positions,
        key_positions=key_positions,
        sinks=sinks,
        precision=precision,
        result="lse" if with_lse else "output",
    )
    sinkless = call if call.sinks is None else without_sinks(call)
    reader, gathered = (
        stored.choose(sinkless, backend) if stored.is_stored(sinkless) else (None, ())
    )
    chosen = _choose(sinkless, backend) if reader is None else reader
    order = backends.order(sinkless)
    reasons = {name: tuple(backends.load(name).unsupported(sinkless)) for name in order}
    return Explanation(chosen.NAME, reasons, call.describe(), gathered)
