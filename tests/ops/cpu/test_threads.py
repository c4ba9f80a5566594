"""The native kernels on several threads, beside each other, and in forked processes."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import zeta
from tests.ops.cpu import units
from tests.ops.cpu.caches import CACHES, Cache
from zeta import biases, masks
from zeta.ops.attention import run_with_weights
from zeta.ops.backends.cpu import library, projection, rotation
from zeta.ops.call import AttentionCall

Results = list[Tensor]


def results(seed: int, dtype: torch.dtype = torch.float32) -> Results:
    """Output and gradients of a call with every kind of sum in it.

    The tensors are too small for torch to use threads itself: in a forked process it would hang.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "query": (2, 4, 100, 32), "key": (2, 2, 100, 32), "value": (2, 2, 100, 32),
        "table": (16, 4), "bias": (1, 4, 1, 100),
    }  # fmt: skip
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}
    bias = biases.Bucketed(leaves["table"], max_distance=40) + biases.Dense(leaves["bias"])
    out = zeta.attention(
        leaves["query"], leaves["key"], leaves["value"], mask=masks.Causal(), bias=bias,
        dropout_p=0.1, seed=7, backend="cpu",
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))]


def assert_equal(actual: Results, expected: Results) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", [90, 1100])
@pytest.mark.parametrize("target", [60, 90, 128, 200])
@pytest.mark.parametrize(
    "mask", [None, masks.Causal(), masks.SlidingWindow(600), masks.SlidingWindow(50)], ids=str
)
def test_one_head_gives_the_same_bits_on_any_number_of_threads(
    mask: masks.Mask | None, target: int, source: int, dtype: torch.dtype
) -> None:
    """Its queries are cut finer than those of many heads; tiles of keys begin where they see."""
    query, key = torch.randn(1, 1, target, 40).to(dtype), torch.randn(1, 1, source, 40).to(dtype)
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        found.append(zeta.attention(query, key, key, mask=mask, backend="cpu"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("two_threads")
def test_who_meets_a_nan_does_not_depend_on_the_number_of_threads() -> None:
    """Rows that are multiplied together share the keys that any of them sees."""
    query, key, value = torch.randn(3, 1, 1, 62, 40).unbind()
    value[..., 45, :] = float("nan")
    found = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        found.append(zeta.attention(query, key, value, mask=masks.Causal(), backend="cpu"))
    assert found[0][0, 0, 45:].isnan().all()
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("two_threads")
def test_a_backward_pass_may_be_a_threads_first_work() -> None:
    """A step's forward pass is one thread's; the others begin with a gradient of many keys."""
    query, key = torch.randn(1, 2, 3, 16, requires_grad=True), torch.randn(1, 2, 400, 16)
    found: Results = []

    def run() -> None:
        torch.set_num_threads(2)
        out = zeta.attention(query, key, key, backend="cpu")
        found.extend(torch.autograd.grad(out.square().sum(), query))

    # A thread of Python's own has a pool of its own, whose threads have not worked yet.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    run()
    assert len(found) == 2
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    expected = results(1, dtype)
    for num_threads in (1, 2, 3, 5):
        torch.set_num_threads(num_threads)
        assert_equal(results(1, dtype), expected)


@pytest.mark.usefixtures("two_threads")
def test_two_python_threads_do_not_meet() -> None:
    seeds = (1, 2, 3)
    expected = {seed: results(seed) for seed in seeds}
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                assert_equal(results(seed), expected[seed])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def run(code: str) -> str:
    """What a fresh interpreter prints; its children that hang are ended with it."""
    preamble = (
        "import torch\nfrom tests.ops.cpu.test_threads import results, assert_equal\n"
        "torch.set_num_threads(2)\nexpected = results(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", preamble + code],
        capture_output=True, text=True, check=False, timeout=120,
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__)))),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_process_computes_the_same() -> None:
    code = """
import os
child = os.fork()
if child == 0:
    assert_equal(results(1), expected)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert_equal(results(1), expected)
print(os.waitstatus_to_exitcode(status))
"""
    assert run(code) == "0\n"


def test_workers_of_a_loader_compute_the_same() -> None:
    code = """
from torch.utils.data import DataLoader, Dataset
class Calls(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return results(1)[0]
for batch in DataLoader(Calls(), num_workers=2, multiprocessing_context="fork"):
    assert_equal([batch[0]], expected[:1])
    print("equal")
"""
    assert run(code) == "equal\n" * 4


def turns_during(call: Callable[[], object]) -> int:
    """How often another thread of Python's had its turn in the middle of a call."""
    started, span = threading.Event(), [0.0, 0.0]
    turns: list[float] = []

    def compute() -> None:
        started.set()
        span[0] = time.perf_counter()
        call()
        span[1] = time.perf_counter()

    worker = threading.Thread(target=compute)
    interval = sys.getswitchinterval()
    # Whoever keeps the lock in C lets the other thread wait for the whole of a call.
    sys.setswitchinterval(1e-4)
    try:
        worker.start()
        started.wait()
        while worker.is_alive():
            turns.append(time.perf_counter())
    finally:
        sys.setswitchinterval(interval)
        worker.join()
    margin = (span[1] - span[0]) / 10
    return sum(span[0] + margin < turn < span[1] - margin for turn in turns)


def an_output() -> Callable[[], object]:
    query = torch.randn(1, 4, 2000, 64)
    return lambda: zeta.attention(query, query, query)


def an_output_with_lse() -> Callable[[], object]:
    query = torch.randn(1, 4, 2000, 64, requires_grad=True)
    return lambda: zeta.attention(query, query, query)


def a_gradient() -> Callable[[], object]:
    query = torch.randn(1, 4, 1500, 64, requires_grad=True)
    loss = zeta.attention(query, query, query).sum()
    return lambda: torch.autograd.grad(loss, query)


def a_projection() -> Callable[[], object]:
    x, layer = torch.randn(1, 64, 2048), (torch.randn(8192, 2048), None)
    return lambda: projection.project(x, layer)


def projected_heads() -> Callable[[], object]:
    x, layers = torch.randn(1, 64, 2048), [(torch.randn(4096, 2048), None)] * 2
    return lambda: projection.project_heads(x, layers, 64)


def a_rotation() -> Callable[[], object]:
    x, table = torch.randn(1, 64, 4096, 128), torch.randn(2, 4096, 64).unbind()
    return lambda: rotation.rotated(x, None, table, True)


DIRECT = {
    "attend": an_output,
    "attend_with_lse": an_output_with_lse,
    "differentiate": a_gradient,
    "project": a_projection,
    "project_heads": projected_heads,
    "rotate": a_rotation,
}


@pytest.mark.parametrize("name", DIRECT)
def test_python_runs_on_meanwhile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's lock is free while the builtins compute, which are called with it."""
    call, native, used = DIRECT[name](), library.load(), []
    assert native.direct is not None
    builtin = getattr(native.direct, name)

    def watched(*arguments: object) -> object:
        used.append(name)
        return builtin(*arguments)

    monkeypatch.setattr(native, "direct", native.direct._replace(**{name: watched}))
    assert turns_during(call) > 20
    assert used == [name]


def test_a_call_that_keeps_the_lock_is_noticed() -> None:
    assert turns_during(lambda: sum(range(10**7))) == 0


@pytest.mark.usefixtures("two_threads", "unit")
@units.on_each(units.FEW_ROWS)
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
def test_caches_give_the_same_bits_on_any_number_of_threads(
    cache: Cache, dtype: torch.dtype
) -> None:
    # Long enough that it is not left to one.
    cache = dataclasses.replace(cache, source=5 * cache.source)
    tensors, found = cache.tensors(dtype), []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        found.append(list(cache.run(tensors).values()))
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@pytest.mark.usefixtures("two_threads", "unit")
@units.on_each(units.ALL)
@pytest.mark.parametrize("mean", [False, True])
def test_weights_are_the_same_bits_on_any_number_of_threads(mean: bool, dtype: torch.dtype) -> None:
    # More scores than one thread makes alone.
    query, key, value = (torch.randn(2, 4, length, 40).to(dtype) for length in (150, 170, 170))
    call = AttentionCall.checked(query, key, value, mask=masks.Causal())
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        alone = zeta.attention_weights(
            query, key, mask=masks.Causal(), reduce="mean" if mean else None, backend="cpu"
        )
        found.append([alone, *run_with_weights(call, mean=mean, backend="cpu")])
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@pytest.mark.usefixtures("two_threads")
def test_operators_give_the_same_bits_on_any_number_of_threads() -> None:
    query, key, value = torch.randn(3, 2, 4, 150, 40).unbind()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return zeta.attention(query, key, value, mask=masks.Causal(), backend="cpu")

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        out = compiled(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])
