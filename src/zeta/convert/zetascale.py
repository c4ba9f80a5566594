"""The ``zetascale`` package's ``MultiheadAttention``: TorchScale's, always multiway.

Its keys are ``q_proj.A.weight``, ``q_proj.B.weight`` and so on. The package is also imported as
``zeta``, so it cannot stand beside this one; a module of it can only come from a copy that was
imported under another name.
"""

import dataclasses
from collections.abc import Collection

from torch import nn

from zeta.convert.errors import ConversionError
from zeta.convert.forms import WITH_BIASES, Form
from zeta.convert.source import Source
from zeta.convert.torchscale import NOT_COMPARED, TORCHSCALE, read, runner, table


def _settle(form: Form, keys: Collection[str]) -> Form:
    own = form.subln or form.xpos_scale_base is not None
    return dataclasses.replace(form, self_attention=own)


def _build(form: Form) -> nn.Module:
    raise ConversionError(
        "zetascale is imported as `zeta`, as this package is, so its modules cannot be made here; "
        "convert the state dict, or the file with `zeta convert --to zetascale`"
    )


ZETASCALE = Source(
    kind="zetascale",
    title="zetascale MultiheadAttention",
    classes=frozenset({"zeta.nn.attention.multihead_attention.MultiheadAttention"}),
    tables=(table((".A", ".B")),),
    read=read,
    settle=_settle,
    build=_build,
    tolerance=1e-5,
    runner=runner,
    expresses=frozenset({"subln", "xpos_scale_base", "multiway"}),
    biases=(WITH_BIASES,),
    not_compared={**NOT_COMPARED, "weights": "zetascale does not return them"},
    stand_in=TORCHSCALE,
)
