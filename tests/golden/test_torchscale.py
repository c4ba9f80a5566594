"""The numbers of TorchScale 0.3.0 on float64 modules, case by case.

``torchscale-0.3.0.safetensors`` was made by running the released package: for each case its inputs,
parameters, outputs and, for a random cotangent of the output, all gradients. The metadata has an
index of the cases under ``cases``.

TorchScale takes its softmax in float32 even here, so its numbers carry an error of about 5e-8,
which Zeta, float64 throughout, does not make. Each case therefore runs twice: with the op as it is,
which must agree within that error; and with a textbook op that takes its softmax as TorchScale
does, where everything around it - projections, masks, rotations, ways, caches, gradients - must
agree to 1e-10. How torch's float32 softmax rounds a row of eight numbers or more depends on the
processor's vectors; the file was made with AVX-512. The two cases with longer rows agree to 1e-10
there, and elsewhere within the error of the softmax; their shorter twins do everywhere.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from zeta.biases import summands
from zeta.nn import MultiheadAttention, RelativePositionBias, set_split_position
from zeta.ops.call import AttentionCall

GOLDEN = Path(__file__).parent / "torchscale-0.3.0.safetensors"
EXACT = 1e-10
ERROR_OF_A_FLOAT32_SOFTMAX = 1e-6
NARROWEST_VECTOR = 8

with safe_open(GOLDEN, "pt") as _file:
    METADATA = _file.metadata()
CASES: dict[str, Any] = json.loads(METADATA["cases"])
EMBED_DIM, NUM_HEADS = int(METADATA["embed_dim"]), int(METADATA["num_heads"])


def named(call: str | None) -> list[str]:
    """The cases with this kind of call; None: those of the relative position bias."""
    return [name for name, case in CASES.items() if case.get("call") == call]


def tensors(case: str, kind: str) -> dict[str, Tensor]:
    """The tensors of a case below ``kind/``, by the rest of their names."""
    prefix = f"{case}/{kind}/"
    with safe_open(GOLDEN, "pt") as file:
        return {
            key.removeprefix(prefix): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118 - not a mapping
            if key.startswith(prefix)
        }


def module_of(name: str) -> MultiheadAttention:
    """Our module with the case's parameters."""
    case = CASES[name]
    module = MultiheadAttention(case["config"], EMBED_DIM, NUM_HEADS, **case["module"]).double()
    module.load_state_dict(tensors(name, "state"), strict=True)
    if case["split_position"] is not None:
        module.apply(set_split_position(case["split_position"]))
    return module


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter, which must have one."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def check_all(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name],
            tensor,
            rtol=atol,
            atol=atol,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def textbook_weights(call: AttentionCall) -> Tensor:
    """Attention weights with the softmax in float32, whatever the dtype of the scores."""
    tile = call.tile()
    scores = call.query @ call.key.mT * call.scale
    for bias in summands(call.bias):
        scores = bias.apply(scores, tile)
    visible = call.visible(tile)
    if visible is not None:
        scores = torch.where(visible, scores, float("-inf"))
    return F.softmax(scores, -1, dtype=torch.float32).type_as(scores)


@pytest.fixture(params=["zeta", "softmax in float32"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """How close a case must come, with Zeta's op or with one that rounds as TorchScale does."""
    if request.param == "zeta":
        return ERROR_OF_A_FLOAT32_SOFTMAX

    def with_weights(call: AttentionCall, *, mean: bool = False) -> tuple[Tensor, Tensor]:
        assert not mean
        weights = textbook_weights(call)
        return weights @ call.value, weights

    monkeypatch.setattr("zeta.nn.calls.run", with_weights)
    monkeypatch.setattr("zeta.nn.calls.run_with_weights", with_weights)
    monkeypatch.setattr("zeta.nn.calls.run_weights", textbook_weights)
    return (
        EXACT
        if rounds_as_the_file(request.getfixturevalue("name"))
        else (ERROR_OF_A_FLOAT32_SOFTMAX)
    )


def rounds_as_the_file(name: str) -> bool:
    """Whether torch's float32 softmax gives the same bits here as where the case was made."""
    inputs = tensors(name, "input")
    row = inputs["key" if "key" in inputs else "x"].shape[1]
    return row < NARROWEST_VECTOR or torch.backends.cpu.get_cpu_capability() == "AVX512"


@pytest.mark.parametrize("name", [*named("self"), *named("cross")])
@pytest.mark.parametrize("need_weights", ["lazy", True])
def test_outputs_weights_and_gradients(name: str, need_weights: Any, tolerance: float) -> None:
    module, inputs = module_of(name), tensors(name, "input")
    cross = CASES[name]["call"] == "cross"
    names = ("query", "key", "value") if cross else ("x", "x", "x")
    expected_gradients = tensors(name, "grad/input")
    for input_name in expected_gradients:
        inputs[input_name].requires_grad_()
    masks = {key: t for key, t in inputs.items() if key not in names}

    attn, weights = module(*(inputs[n] for n in names), **masks, need_weights=need_weights)
    attn.backward(cotangent(name))

    check_all({"attn": attn, "attn_weights": weights}, tensors(name, "output"), tolerance)
    check_all({n: inputs[n].grad for n in expected_gradients}, expected_gradients, tolerance)
    expected = tensors(name, "grad/state")
    assert expected
    found = gradients_of(module)
    # Where TorchScale gave a way no gradient at all, ours is zeros.
    for missing in found.keys() - expected.keys():
        assert ".A." in missing or ".B." in missing
        assert not found[missing].any()
    check_all(found, expected, tolerance)


def cotangent(name: str) -> Tensor:
    with safe_open(GOLDEN, "pt") as file:
        return file.get_tensor(f"{name}/cotangent")


@pytest.mark.parametrize("name", named("incremental"))
@pytest.mark.parametrize("mark_first_step", [False, True])
def test_one_token_at_a_time(name: str, mark_first_step: bool, tolerance: float) -> None:
    module, x = module_of(name).eval(), tensors(name, "input")["x"]
    state: dict[str, Any] = {}
    steps = []
    for t in range(x.shape[1]):
        token = x[:, t : t + 1]
        first = mark_first_step and t == 0
        steps.append(module(token, token, token, state, is_first_step=first)[0])
    check_all({"attn": torch.cat(steps, 1)}, tensors(name, "output"), tolerance)


@pytest.mark.parametrize("name", named(None))
def test_dense_relative_position_bias(name: str) -> None:
    case = CASES[name]
    fields = ("bidirectional", "num_buckets", "max_distance", "n_heads")
    module = RelativePositionBias(**{field: case[field] for field in fields}).double()
    module.load_state_dict(tensors(name, "state"), strict=True)
    expected = tensors(name, "output")
    check_all({key: module(*call) for key, call in case["calls"].items()}, expected, EXACT)


def test_every_case_is_run() -> None:
    run = {*named("self"), *named("cross"), *named("incremental"), *named(None)}
    assert run == CASES.keys()


def test_a_wrong_number_is_noticed() -> None:
    expected = tensors("self", "output")
    with pytest.raises(AssertionError, match="attn"):
        check_all({name: t + 2 * EXACT for name, t in expected.items()}, expected, EXACT)
