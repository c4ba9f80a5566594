"""torch's attention module and Zeta's on the same inputs: options, inputs, comparison.

Shapes: B batch, H heads, T target length, S source length, E embedding.
"""

import dataclasses
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from zeta.integrations.pytorch import MultiheadAttention, Weights

BATCH, HEADS, TARGET, SOURCE, EMBED = 3, 2, 5, 7, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """How a module is made and called. A mask is a kind, ``bool`` or ``float``, and its dims."""

    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    sizes: tuple[int, int] = (EMBED, EMBED)
    batch_first: bool = False
    batched: bool = True
    shared: str = ""
    attn_mask: str | None = None
    key_padding_mask: str | None = None
    is_causal: bool = False
    weights: str | None = None


VALUES: dict[str, tuple[Any, ...]] = {
    "bias": (True, False),
    "add_bias_kv": (True, False),
    "add_zero_attn": (True, False),
    "sizes": ((EMBED, EMBED), (6, 10), (EMBED, 4)),
    "batch_first": (True, False),
    "batched": (True, False),
    "shared": ("", "key is value", "all"),
    "attn_mask": (None, "bool 2", "float 2", "bool 3", "float 3"),
    "key_padding_mask": (None, "bool prefix", "bool", "float", "infinite", "nothing hidden"),
    "is_causal": (True, False),
    "weights": (None, "mean", "heads"),
}


def cases(first: str, second: str) -> list[Case]:
    """Every two values of two options, the others as they usually are."""
    found = []
    for one, other in itertools.product(VALUES[first], VALUES[second]):
        case = dataclasses.replace(Case(), **{first: one, second: other})
        if not case.shared or case.sizes == (EMBED, EMBED):
            found.append(case)
    return found


def pairs() -> dict[tuple[str, str], list[Case]]:
    """Every two options and their `cases`, those of earlier pairs left out."""
    seen: set[Case] = set()
    found = {}
    for first, second in itertools.combinations(VALUES, 2):
        new = [case for case in cases(first, second) if case not in seen]
        seen.update(new)
        found[first, second] = new
    return found


def modules(
    case: Case, *, dropout: float = 0.0, weights: Weights = "zeta"
) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """Both modules with the same parameters, drawn anew, biases included."""
    arguments: dict[str, Any] = {
        "dropout": dropout,
        "bias": case.bias,
        "add_bias_kv": case.add_bias_kv,
        "add_zero_attn": case.add_zero_attn,
        "kdim": case.sizes[0],
        "vdim": case.sizes[1],
        "batch_first": case.batch_first,
        "dtype": torch.float64,
    }
    theirs = nn.MultiheadAttention(EMBED, HEADS, **arguments)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours = MultiheadAttention(EMBED, HEADS, **arguments, weights=weights)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(case: Case) -> list[Tensor]:
    """Query, key and value in the layout of the case; leaves that require a gradient."""
    source = TARGET if case.shared == "all" or case.is_causal else SOURCE
    made: list[Tensor] = []
    for length, size in ((TARGET, EMBED), (source, case.sizes[0]), (source, case.sizes[1])):
        shape = (length, BATCH, size)
        if case.batch_first:
            shape = (BATCH, length, size)
        made.append(torch.randn(shape if case.batched else (length, size), dtype=torch.float64))
    if case.shared == "all":
        made = [made[0]] * 3
    elif case.shared:
        made[2] = made[1]
    return [tensor.requires_grad_() for tensor in made]


def masks(case: Case) -> dict[str, Tensor]:
    """The masks of a case, as keywords; every query sees something."""
    found: dict[str, Tensor] = {}
    source = TARGET if case.shared == "all" or case.is_causal else SOURCE
    batch = BATCH if case.batched else 1
    if case.is_causal:
        # torch's hint needs its mask.
        found["attn_mask"] = torch.ones(TARGET, TARGET).triu(1).bool()
    elif case.attn_mask is not None:
        kind, dims = case.attn_mask.split()
        leading = () if dims == "2" else (batch * HEADS,)
        found["attn_mask"] = torch.randn(*leading, TARGET, source, dtype=torch.float64)
        if kind == "bool":
            found["attn_mask"] = found["attn_mask"] > 0.5
            found["attn_mask"][..., 0] = False
        else:
            found["attn_mask"].requires_grad_()
    if case.key_padding_mask is not None:
        padding = torch.zeros(batch, source, dtype=torch.bool)
        if case.key_padding_mask in ("bool prefix", "infinite"):
            padding[0, 3:] = padding[-1, 1:] = True
        elif case.key_padding_mask == "bool":
            padding[0, 2:4] = True
        if case.key_padding_mask == "infinite":
            numbers = torch.zeros(padding.shape, dtype=torch.float64)
            padding = numbers.masked_fill(padding, float("-inf"))
        elif case.key_padding_mask == "float":
            padding = torch.randn(batch, source, dtype=torch.float64)
        found["key_padding_mask"] = padding if case.batched else padding[0]
    return found


def run(module: nn.MultiheadAttention, case: Case, tensors: list[Tensor], keywords: Any) -> Any:
    """Output and weights, and the gradients of both by inputs, parameters and a float mask."""
    # With the hint torch hides the module's own keys on its fused path, and on no other.
    extra = case.add_bias_kv or case.add_zero_attn
    is_causal = case.is_causal and (isinstance(module, MultiheadAttention) or not extra)
    with warnings.catch_warnings():
        # torch deprecates masks of two types in one call.
        warnings.filterwarnings("ignore", "Support for mismatched")
        out, weights = module(
            *tensors, **keywords, is_causal=is_causal,
            need_weights=case.weights is not None, average_attn_weights=case.weights == "mean",
        )  # fmt: skip
    loss = (out * wave(out)).sum()
    if weights is not None:
        loss = loss + (weights * wave(weights)).sum()
    leaves = {f"input {number}": tensor for number, tensor in enumerate(tensors)}
    leaves |= dict(module.named_parameters())
    mask = keywords.get("attn_mask")
    if mask is not None and mask.requires_grad:
        leaves["attn_mask"] = mask
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {"out": out, "weights": weights, **dict(zip(leaves, gradients, strict=True))}


def wave(tensor: Tensor) -> Tensor:
    """Numbers that make every element of a gradient count."""
    return torch.arange(tensor.numel(), dtype=torch.float64).cos().view(tensor.shape)


def assert_same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    """Fails, with the name, where two results differ; an unused input's gradient is 0 or None."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        if expected is None or found is None:
            assert expected is None or not expected.any(), name
            assert found is None or not found.any(), name
            continue
        # Of a computed one, as of every tensor, the value is asked for by an operation.
        torch.testing.assert_close(
            found.clone(),
            expected,
            rtol=1e-9,
            atol=1e-11,
            msg=lambda text, name=name: f"{name}: {text}",
        )
