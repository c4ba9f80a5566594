"""`register`: tells Transformers what ``attn_implementation="zeta"`` means."""

import re

from zeta.integrations.huggingface import t5
from zeta.integrations.huggingface.functions import attention, mask

NAME = "zeta"
OLDEST = (5, 23)
"""The version of Transformers from which on functions are called as these expect."""


def register(*, structured_bias: bool = False) -> None:
    """Make ``"zeta"`` an attention implementation of Transformers.

    From then on ``AutoModel.from_config(config, attn_implementation="zeta")``, the same argument of
    ``from_pretrained``, and ``model.set_attn_implementation("zeta")`` run a model's attention on
    Zeta: every model that calls its attention by name, in training and evaluation, with padding,
    caches and ``generate()``. ``output_attentions=True`` returns weights that are computed when
    they are first used, and are those before dropout.

    Call it as often as you like; the last call counts.

    Args:
        structured_bias: Hand T5's relative position bias to Zeta as its table instead of a
            ``(1, heads, T, S)`` tensor, so that memory in training grows linearly with the length,
            the gradient of the table included. It wraps the ``forward`` of the attention of T5 and
            MT5, for models that run on ``"zeta"``; ``register()`` takes the wrapping off again.

    Raises:
        ImportError: Transformers is absent, or older than 5.23.
    """
    _require()
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    if structured_bias:
        t5.wrap(NAME)
    else:
        t5.unwrap()


def _require() -> None:
    wanted = ".".join(map(str, OLDEST))
    install = f"zeta.integrations.huggingface needs transformers {wanted} or newer"
    remedy = "pip install 'zeta-attention[transformers]'"
    try:
        from transformers import __version__ as version
    except ImportError as error:
        raise ImportError(f"{install}: {remedy}") from error
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        raise ImportError(f"{install}, and found {version}: {remedy}")
