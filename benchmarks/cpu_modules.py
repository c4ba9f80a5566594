"""The rows of the CPU benchmark that time whole modules.

A training step in TorchScale's configuration against the module of TorchScale 0.3.0, installed with
``pip install --no-deps torchscale==0.3.0``; and short calls of the module against its work written
by hand. Shape suffixes: B batch, T length, E embedding.
"""

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cpu_problem import Results, Run
from benchmarks.cpu_rows import BOUNDS, DTYPES, Row, Work
from zeta.bench.machine import installed_version
from zeta.nn import MultiheadAttention, RelativePositionBias

TORCHSCALE = "0.3.0"
STEPS = ((8, 512, 512), (1, 2048, 1024))
QUICK_STEPS = ((2, 96, 128),)
HEAD_DIM = 64
DROPOUT_P = 0.1

Attend = Callable[[Tensor], Tensor]


def torchscale_components() -> tuple[Any, Any]:
    """TorchScale's `MultiheadAttention` and `RelativePositionBias`.

    Raises:
        ImportError: It is not installed, or in another version.
    """
    found = installed_version("torchscale")
    if found != TORCHSCALE:
        raise ImportError(
            f"the peer is torchscale {TORCHSCALE}, found {found}: "
            f"pip install --no-deps torchscale=={TORCHSCALE}"
        )
    from torchscale.component import multihead_attention, relative_position_bias

    return multihead_attention.MultiheadAttention, relative_position_bias.RelativePositionBias


def training_rows(quick: bool) -> Iterator[Row]:
    """Steps with sub-LN, xPos, a causal mask, rel_pos with a gradient, and dropout."""
    for dtype, bar in (("bf16", 4.0), ("fp32", 2.5)):
        for shape in QUICK_STEPS if quick else STEPS:

            def make(dtype: str = dtype, shape: tuple[int, int, int] = shape) -> Work:
                return _training(DTYPES[dtype], *shape)

            yield Row(f"{dtype} module training", "{} {} {}".format(*shape), make, bar)


class _Step:
    """One module with its position bias, and a training step of it."""

    def __init__(self, module: Any, bias: nn.Module, as_tensor: bool) -> None:
        self.module, self.bias, self.as_tensor = module, bias, as_tensor

    def run(self, x: Tensor, mask: Tensor, incoming: Tensor) -> Results:
        batch, length, _ = x.shape
        rel_pos = self.bias(batch, length, length) if self.as_tensor else self.bias
        out = self.module(x, x, x, attn_mask=mask, rel_pos=rel_pos)[0]
        leaves = {"x": x, **dict(self.module.named_parameters())}
        leaves |= {f"rel_pos.{name}": leaf for name, leaf in self.bias.named_parameters()}
        found = torch.autograd.grad(out, list(leaves.values()), incoming)
        return {"out": out} | dict(zip(leaves, found, strict=True))

    def with_dropout(self, p: float) -> "_Step":
        """Itself, dropping weights with probability ``p`` from now on."""
        if isinstance(self.module, MultiheadAttention):
            self.module.dropout = p
        else:
            self.module.dropout_module.p = p
        return self


def _training(dtype: torch.dtype, batch: int, length: int, embed: int) -> Work:
    heads = embed // HEAD_DIM
    args = types.SimpleNamespace(
        multiway=False, layernorm_eps=1e-5, xpos_rel_pos=True, xpos_scale_base=512
    )
    their_module, their_bias = torchscale_components()
    peer = _Step(
        their_module(args, embed, heads, DROPOUT_P, self_attention=True, subln=True),
        their_bias(n_heads=heads),
        as_tensor=True,
    )
    ours, oracle = (
        _Step(
            MultiheadAttention(args, embed, heads, self_attention=True, subln=True),
            RelativePositionBias(n_heads=heads),
            as_tensor=False,
        )
        for _ in range(2)
    )
    for step, kind in ((peer, dtype), (ours, dtype), (oracle, torch.float64)):
        # The same rounded parameters everywhere.
        step.module.load_state_dict({k: v.to(dtype) for k, v in peer.module.state_dict().items()})
        step.bias.load_state_dict({k: v.to(dtype) for k, v in peer.bias.state_dict().items()})
        step.module.to(kind)
        step.bias.to(kind)
    x = torch.randn(batch, length, embed).to(dtype).requires_grad_()
    incoming = torch.randn(batch, length, embed).to(dtype)
    mask = torch.full((length, length), float("-inf")).triu(1).to(dtype)

    def wide() -> Results:
        x64, mask64, incoming64 = (t.detach().double() for t in (x, mask, incoming))
        return oracle.run(x64.requires_grad_(), mask64, incoming64)

    def run(step: _Step, dropout_p: float) -> Run:
        return lambda: step.with_dropout(dropout_p).run(x, mask, incoming)

    return Work(
        run(ours, DROPOUT_P),
        run(peer, DROPOUT_P),
        wide,
        {"ours": run(ours, 0.0), "peer": run(peer, 0.0)},
        # Projections and a norm in bfloat16 round more than attention alone.
        bound=4 * BOUNDS[dtype],
        # TorchScale's tables of xPos are in bfloat16.
        is_peer_rough=True,
    )


def small_module_rows(quick: bool) -> Iterator[Row]:
    """Short calls of a module without a gradient, against linears and torch's attention."""
    for dtype in DTYPES:
        for heads in (8,) if quick else (1, 8):
            for length in (1,) if quick else (1, 2, 4, 8, 16, 32, 64):

                def make(dtype: str = dtype, heads: int = heads, length: int = length) -> Work:
                    return small_module(DTYPES[dtype], heads, length)

                yield Row(f"{dtype} small module", f"H {heads} T {length}", make, 0.95, 1.3)


def small_module(
    dtype: torch.dtype, heads: int, length: int, wrap: Callable[[Attend], Attend] = lambda f: f
) -> Work:
    """Self-attention of one sequence.

    Args:
        wrap: Of what is timed, ours and by hand; it may compile it.
    """
    embed = heads * HEAD_DIM
    module = MultiheadAttention(None, embed, heads, self_attention=True).eval().to(dtype)
    wide = MultiheadAttention(None, embed, heads, self_attention=True).eval().double()
    wide.load_state_dict(module.state_dict())
    x = torch.randn(1, length, embed).to(dtype)
    projections = (module.q_proj, module.k_proj, module.v_proj)

    def by_hand(x: Tensor) -> Tensor:
        q, k, v = (p(x).view(1, length, heads, HEAD_DIM).transpose(1, 2) for p in projections)
        out = F.scaled_dot_product_attention(q, k, v)
        joined: Tensor = module.out_proj(out.transpose(1, 2).reshape(1, length, embed))
        return joined

    def run(attend: Attend, x: Tensor = x) -> Run:
        @torch.no_grad()
        def once() -> Results:
            return {"out": attend(x)}

        return once

    ours, peer = run(wrap(lambda x: module(x, x, x)[0])), run(wrap(by_hand))
    oracle = run(lambda x: wide(x, x, x)[0], x.double())
    checked = {"ours": ours, "peer": peer}
    return Work(ours, peer, oracle, checked, 2 * BOUNDS[dtype], calls=50)
