"""Runs the native kernels on guarded memory, for test_guard_pages.py, in a process of its own.

A read or write outside of a buffer ends the process; the last line that it printed names the call.
Outputs must be, bit for bit, what the same call makes in ordinary memory.

    python -m tests.ops.cpu.guarded_calls bfloat16 [--library FILE]
"""

import argparse
import contextlib
import ctypes
import itertools
import math
import resource
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.ops.cases import Case, far_from_zero, taken
from tests.ops.cpu import units
from tests.ops.cpu.caches import CACHES, Cache
from tests.ops.cpu.guards import Guards, guarded
from tests.ops.cpu.layers import PROJECTIONS, Projection
from tests.ops.rotations import TURNINGS, Turning
from zeta import biases, masks
from zeta.ops.backends.cpu import layout, library, passes, rotation
from zeta.ops.backends.cpu.description import Fixed
from zeta.ops.call import AttentionCall
from zeta.ops.dropout import threshold
from zeta.ops.lowering import lower
from zeta.ops.plain_lowering import Plain

Results = dict[str, Tensor]


def _odd(*sizes: int, layout: str = "BHTD", **more: Any) -> Case:
    batch, heads, key_heads, target, source, head_dim, value_dim = sizes
    return Case(
        "odd sizes " + " ".join(map(str, sizes)),
        batch,
        heads,
        key_heads,
        target,
        source,
        head_dim,
        value_dim,
        layout=layout,
        **more,
    )


ODD = [
    _odd(1, 1, 1, 1, 1, 1, 1),
    _odd(2, 4, 2, 3, 301, 17, 5, layout="BTHD"),
    _odd(1, 4, 1, 1, 1033, 33, 31),
    _odd(1, 2, 1, 5, 513, 64, 96, layout="BTHD"),
    _odd(1, 2, 2, 131, 261, 65, 63),
    _odd(1, 2, 1, 20, 389, 65, 63),
    _odd(1, 2, 1, 97, 67, 128, 80, layout="BHDT"),
    _odd(
        *(1, 4, 2, 35, 530, 40, 24),
        learned={"table": (32, 4), "bias": (1, 4, 1, 530)},
        bias=lambda m: biases.Bucketed(m["table"], max_distance=20) + biases.Dense(m["bias"]),
        mask=lambda: masks.Causal() & masks.Padding(torch.tensor([517])),
        dropout_p=0.2,
    ),
    far_from_zero(-1e9, batch=1, key_heads=2, target=5, source=301, head_dim=17, value_dim=5),
]


ONE_EACH = {"documents causal", "prefix", "keep full", "dense and t5 and alibi"}
OPERANDS = {
    True: ONE_EACH,
    False: ONE_EACH | {"length inside", "padding causal", "t5 causal long", "a ring of slots"},
}
"""Names of cases that have every kind of operand between them: of a few where software runs."""


DIRECT = [
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 3, 301, 17),
    (1, 4, 1, 1, 1033, 33),
    (1, 2, 2, 131, 261, 65),
    (1, 1, 1, 70, 70, 64),
]
"""Batch, heads, key heads, lengths and head dimension of calls that skip the description."""


Calls = Iterator[tuple[str, Callable[[bool | None], Results]]]
"""Names of calls, and what makes one: in ordinary memory, or at an end of guarded memory."""


def calls(dtype: torch.dtype, only: str, has_few_rows: bool) -> Calls:
    """All whose names have a part.

    Args:
        has_few_rows: The instruction set has code of its own for caches and linear layers.
    """
    for name, run in itertools.chain(
        _attentions(dtype), _direct_calls(dtype), _few_rows(dtype) if has_few_rows else ()
    ):
        if only in name:
            yield name, run


def _attentions(dtype: torch.dtype) -> Calls:
    # The dtype changes how rows are read and written, not what is asked for; nor does software,
    # which takes its time.
    is_emulated = library.load().path == units.EMULATED
    every = dtype == torch.float32 and not is_emulated
    for case in taken("cpu") + ODD:
        if every or case in ODD or case.name in OPERANDS[is_emulated]:
            yield case.name, lambda at_end, case=case: _attention(case, dtype, at_end)
            for reduce in (None, "mean"):
                yield (
                    f"{case.name}, weights {reduce or 'each'}",
                    lambda at_end, case=case, reduce=reduce: _weights(case, dtype, reduce, at_end),
                )


def _direct_calls(dtype: torch.dtype) -> Calls:
    for sizes in DIRECT:
        for kind in ("", " causal", " table", " everything"):
            yield (
                f"direct {sizes}{kind}",
                lambda at_end, sizes=sizes, kind=kind: _direct(sizes, kind, dtype, at_end),
            )


def _few_rows(dtype: torch.dtype) -> Calls:
    for cache in CACHES:
        yield cache.name, lambda at_end, cache=cache: _decode(cache, dtype, at_end)
    for case in PROJECTIONS:
        yield case.name, lambda at_end, case=case: _project(case, dtype, at_end)
    for turning in TURNINGS:
        yield f"rotation, {turning.name}", lambda at_end, case=turning: _turn(case, dtype, at_end)


def _leaves(case: Case, dtype: torch.dtype, at_end: bool | None) -> Results:
    made = case.tensors(dtype)
    if at_end is None:
        return made
    return {k: guarded(v.detach(), at_end).requires_grad_() for k, v in made.items()}


@contextlib.contextmanager
def _by_records() -> Iterator[None]:
    """Whatever takes tensors as they are has cases of its own."""
    from zeta.ops.backends.cpu import operators  # Registered from the library that was asked for.

    with (
        patch.object(library.load(), "direct", None),
        patch.object(operators.attention, "_kernel", operators.attention.python_kernel),
        patch.object(
            operators.attention_backward, "_kernel", operators.attention_backward.python_kernel
        ),
    ):
        yield


def _attention(case: Case, dtype: torch.dtype, at_end: bool | None) -> Results:
    made = _leaves(case, dtype, at_end)
    with _by_records():
        if at_end is None:
            return case.run(made, "cpu")
        with Guards(at_end):
            return case.run(made, "cpu")


def _weights(case: Case, dtype: torch.dtype, reduce: str | None, at_end: bool | None) -> Results:
    made = _leaves(case, dtype, at_end)

    def run() -> Results:
        found = case.run_weights(made, "cpu", reduce)
        return found if case.dropout_p else found | _output_and_weights(case, made, reduce)

    if at_end is None:
        return run()
    with Guards(at_end):
        return run()


@torch.no_grad()
def _output_and_weights(case: Case, made: Results, reduce: str | None) -> Results:
    # Not through the backend, which takes two passes where a mode watches.
    call = AttentionCall.checked(made["query"], made["key"], made["value"], **case.arguments(made))
    lowered = lower(call)
    operands = (call.query, call.key, call.value, lowered.offsets, lowered.dense)
    out, weights = passes.output_and_weights(
        *operands, reduce == "mean", Fixed(*lowered.fixed(), False)
    )
    return {"out": out, "weights of the same pass": weights}


def _direct(sizes: tuple[int, ...], kind: str, dtype: torch.dtype, at_end: bool | None) -> Results:
    batch, heads, key_heads, target, source, head_dim = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def put(tensor: Tensor) -> Tensor:
        return tensor if at_end is None else guarded(tensor, at_end)

    def placed(*shape: int) -> Tensor:
        return put(torch.randn(shape, generator=generator).to(dtype))

    query, key, value, out, grad_out, grad_query, grad_key, grad_value = (
        placed(batch, number, length, head_dim)
        for number, length in (
            (heads, target), (key_heads, source), (key_heads, source), (heads, target),
            (heads, target), (heads, target), (key_heads, source), (key_heads, source),
        )
    )  # fmt: skip
    plain, of_bias = Plain(causal=kind == " causal"), (None, None)
    if kind == " table":
        buckets = torch.randint(0, 5, (23,), generator=generator)
        plain = Plain(table=put(torch.randn(5, heads, generator=generator)), buckets_R=put(buckets))
    if kind == " everything":
        plain = Plain(
            causal=True, window=50, softcap=3.0, dropout_p=0.2, drop_below=threshold(0.2), seed=7,
            padding_B=put(torch.full((batch,), source - 1)),
            keep=put(torch.rand(batch, heads, target, source, generator=generator) < 0.8),
            offsets=put(torch.randn(heads, 23, generator=generator)),
            slopes_H=put(torch.rand(heads, generator=generator)),
            dense=placed(1, heads, target, source),
        )  # fmt: skip
        of_bias = put(torch.zeros(heads, 23)), put(torch.zeros(1, heads, target, source))
    native = library.load()
    direct = native.direct
    assert direct is not None
    options = None, False, 2, *plain
    assert direct.attend(query, key, value, out, *options) == library.DONE
    alone = out.clone()
    lse = direct.attend_with_lse(query, key, value, out, *options)
    assert torch.equal(alone, out)
    gradients = grad_query, grad_key, grad_value, *of_bias
    saved = query, key, value, out, lse if at_end is None else guarded(lse, at_end)
    assert direct.differentiate(*saved, grad_out, *gradients, *options) == library.DONE
    found = {"out": out, "lse": lse} | {
        f"gradient {number}": gradient
        for number, gradient in enumerate(gradients)
        if gradient is not None
    }
    if plain.table is None:
        of_operators = _operators(plain, saved, grad_out)
        compare(
            of_operators, {name: found[name].to(made.dtype) for name, made in of_operators.items()}
        )
    return found


def _operators(plain: Plain, saved: tuple[Tensor, ...], grad_out: Tensor) -> Results:
    """What the operators' own kernels make of the same."""
    from zeta.ops.backends.cpu import operators

    query, key, value, *_ = saved
    lowered = plain.lowered(1.0 / math.sqrt(query.shape[3]))
    biases, fixed = (lowered.offsets, lowered.dense), (*lowered.fixed(), False)
    out, lse = operators.attention._kernel(query, key, value, *biases, *fixed)
    needed = [bias is not None for bias in biases]
    gradients = operators.attention_backward._kernel(
        grad_out, None, *saved, *biases, *fixed, *needed
    )
    return {"out": out, "lse": lse} | {
        f"gradient {number}": gradient
        for number, gradient in enumerate(gradients)
        if number < 3 or needed[number - 3]
    }


def _decode(cache: Cache, dtype: torch.dtype, at_end: bool | None) -> Results:
    tensors = cache.tensors(dtype)
    if at_end is None:
        return cache.run(tensors)
    with Guards(at_end):
        return cache.run({name: guarded(tensor, at_end) for name, tensor in tensors.items()})


def _project(case: Projection, dtype: torch.dtype, at_end: bool | None) -> Results:
    x, layers = case.tensors(dtype)
    if at_end is None:
        return case.run(x, layers)
    moved = [
        (guarded(weight, at_end), None if bias is None else guarded(bias, at_end))
        for weight, bias in layers
    ]
    with Guards(at_end):
        return case.run(guarded(x, at_end), moved)


def _turn(case: Turning, dtype: torch.dtype, at_end: bool | None) -> Results:
    made, (of_query, of_key) = case.tensors(dtype, "cpu"), case.tables("cpu", torch.float32)
    operands = [x.detach() for x in (*made.values(), *of_query, *of_key)]
    with contextlib.nullcontext() if at_end is None else Guards(at_end):
        if at_end is not None:
            operands = [guarded(tensor, at_end) for tensor in operands]
        query, key, *tables = operands
        there = rotation.rotated(query, key, tables, case.interleaved)
        back = rotation.rotated(query, None, tables[:2], case.interleaved)[:1]
    names = "query", "key", "query alone"
    return dict(zip(names, there + back, strict=True))


def spoil(name: str, field: str, change: int) -> None:
    """Make a pass believe that a field of its calls is ``change`` more than it is."""
    native = library.load()
    run = getattr(native, name)
    part = layout.Part(field)

    def spoilt(record: ctypes.Array[ctypes.c_char]) -> int:
        first, *others = part.read(record)
        part.write(record, first + change, *others)
        answer: int = run(record)
        return answer

    setattr(native, name, spoilt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--library", type=Path, help="another library than the installed one")
    parser.add_argument(
        "--emulated", action="store_true", help="the instruction sets that the processor has not"
    )
    parser.add_argument("--ordinary", action="store_true", help="in ordinary memory alone")
    arguments = parser.parse_args()
    names: Iterable[str] = library.INSTRUCTION_SETS
    if arguments.emulated:
        usable = library.Library(library.PATH).usable
        names = [name for name in names if name not in usable]
        library.PATH = units.EMULATED
    elif arguments.library:
        library.PATH = arguments.library.resolve()
    for run in named_calls(getattr(torch, arguments.dtype), names=names):
        expected = run(None)
        if arguments.ordinary:
            continue
        for at_end in (True, False):
            compare(run(at_end), expected)
    print("done")


def named_calls(
    dtype: torch.dtype, only: str = "", names: Iterable[str] = library.INSTRUCTION_SETS
) -> Iterator[Callable[[bool | None], Results]]:
    """All calls whose names have a part, with these instruction sets; the names are printed."""
    native = library.load()
    torch.set_num_threads(2)
    # A process that ends as it should leaves nothing behind.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for instructions in names:
        if instructions not in native.usable or (instructions, dtype) not in units.ALL:
            continue
        native.instruction_set = library.INSTRUCTION_SETS.index(instructions) + 1
        has_few_rows = (instructions, dtype) in units.FEW_ROWS
        for name, run in calls(dtype, only, has_few_rows):
            print(f"{instructions}: {name}", flush=True)
            yield run


def make_spoilt(name: str, field: str, change: int, only: str, names: Path) -> None:
    """Make calls that are spoilt so, and write down their names."""
    with names.open("w") as output, contextlib.redirect_stdout(output):
        spoil(name, field, change)
        for run in named_calls(torch.float32, only):
            for at_end in (True, False):
                run(at_end)


def compare(actual: Results, expected: Results) -> None:
    """Fail where results are not the same bits."""
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=name)


if __name__ == "__main__":
    main()
