"""``torch.nn.MultiheadAttention``, with one packed input projection or separate ones."""

from torch import Tensor, nn

from zeta.convert.forms import Form
from zeta.convert.source import Example, Runner, Source
from zeta.convert.tables import Entry, Table, linear

_INPUTS = ("q_proj", "k_proj", "v_proj")
_BIAS = Entry("in_proj_bias", tuple(f"{name}.bias" for name in _INPUTS), optional=True)
EXTRA_KEY: Table = tuple(Entry(name, (name,), optional=True) for name in ("bias_k", "bias_v"))
PACKED: Table = (
    Entry("in_proj_weight", tuple(f"{name}.weight" for name in _INPUTS)),
    _BIAS,
    *linear("out_proj", "out_proj"),
    *EXTRA_KEY,
)
SEPARATE: Table = (
    *(Entry(f"{name}_weight", (f"{name}.weight",)) for name in _INPUTS),
    _BIAS,
    *linear("out_proj", "out_proj"),
    *EXTRA_KEY,
)

_ALL_HIDDEN = {
    "queries whose keys are all hidden": "torch gives NaN or 0 by the path taken, Zeta 0"
}


def _read(module: nn.Module) -> Form:
    assert isinstance(module, nn.MultiheadAttention)
    return Form.plain(
        module.embed_dim,
        module.num_heads,
        kdim=module.kdim,
        vdim=module.vdim,
        dropout=module.dropout,
        add_bias_kv=module.bias_k is not None,
        add_zero_attn=module.add_zero_attn,
    )


def _build(form: Form) -> nn.Module:
    return nn.MultiheadAttention(
        form.embed_dim,
        form.num_heads,
        form.dropout,
        bias=bool(form.biases),
        add_bias_kv=form.add_bias_kv,
        add_zero_attn=form.add_zero_attn,
        kdim=form.kdim,
        vdim=form.vdim,
        batch_first=True,
    )


def _runner(module: nn.Module) -> Runner:
    assert isinstance(module, nn.MultiheadAttention)

    def call(example: Example) -> tuple[Tensor, Tensor]:
        tensors = [example.query, example.key, example.value]
        if not module.batch_first:
            swapped = {id(tensor): tensor.transpose(0, 1) for tensor in tensors}
            tensors = [swapped[id(tensor)] for tensor in tensors]
        mask = example.hidden if example.added is None else example.additive(with_padding=False)
        padding = example.padding
        if padding is not None and mask is not None and mask.is_floating_point():
            # Masks of two dtypes are deprecated there.
            padding = mask.new_zeros(padding.shape).masked_fill(padding, float("-inf"))
        out, weights = module(
            *tensors, key_padding_mask=padding, attn_mask=mask, average_attn_weights=False
        )
        out = out if module.batch_first else out.transpose(0, 1)
        return out, weights.transpose(0, 1)

    extra = module.bias_k is not None or module.add_zero_attn
    return Runner(call, separate_values=True, not_compared={} if extra else _ALL_HIDDEN)


TORCH = Source(
    kind="torch",
    title="torch.nn.MultiheadAttention",
    classes=frozenset(
        {
            "torch.nn.modules.activation.MultiheadAttention",
            "zeta.integrations.pytorch.MultiheadAttention",
        }
    ),
    tables=(PACKED, SEPARATE),
    read=_read,
    settle=lambda form, keys: form,
    build=_build,
    runner=_runner,
    expresses=frozenset({"kdim", "vdim", "add_bias_kv", "add_zero_attn"}),
    not_compared={"decoding": "torch.nn.MultiheadAttention has no cache"},
)
