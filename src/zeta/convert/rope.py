"""The rotation in a configuration of Transformers, its ``rope_parameters``: read and written."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from zeta.convert.errors import ConversionError
from zeta.convert.forms import Rotary
from zeta.nn import LinearScaling, Llama3Scaling, YarnScaling
from zeta.nn.scalings import Scaling

_SCALINGS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}
"""By ``rope_type``; their arguments have the names of a configuration."""

_BY_LENGTH = frozenset({"dynamic", "longrope"})


def read_rotary(parameters: Mapping[str, Any]) -> Rotary:
    """The rotation of a Llama or a Mistral.

    Args:
        parameters: ``rope_parameters`` of its configuration, where Transformers also puts what
            older files call ``rope_scaling`` and ``rope_theta``.

    Raises:
        ConversionError: `zeta.nn.RotaryEmbedding` has no such rotation, or a parameter is missing
            or wrong.
    """
    part = parameters.get("partial_rotary_factor")
    if part not in (None, 1.0):
        raise ConversionError(
            f"partial_rotary_factor={part} cannot be converted: Llama and Mistral of Transformers "
            "rotate whole heads"
        )
    kind = parameters.get("rope_type", "default")
    scaling = None if kind == "default" else _read_scaling(kind, parameters)
    base = parameters["rope_theta"]
    if not isinstance(base, int | float) or not base > 0.0:
        raise ConversionError(f"rope_theta must be a positive number; got {base}")
    return Rotary(float(base), interleaved=False, scaling=scaling)


def rope_options(rotary: Rotary) -> dict[str, Any]:
    """Arguments for the configuration of a Llama or a Mistral that rotates so.

    Raises:
        ConversionError: Transformers has no such scaling.
    """
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.base}
    scaling = rotary.scaling
    if scaling is None:
        return {"rope_parameters": parameters}
    kinds = {known: kind for kind, known in _SCALINGS.items()}
    if type(scaling) not in kinds:
        raise ConversionError(f"scaling={type(scaling).__name__} cannot be converted")
    parameters["rope_type"] = kinds[type(scaling)]
    given = dataclasses.asdict(scaling).items()
    parameters |= {name: value for name, value in given if value is not None}
    options: dict[str, Any] = {"rope_parameters": parameters}
    if not isinstance(scaling, LinearScaling):
        # Only for Transformers to find that it is `factor` times the original one.
        length = scaling.factor * parameters["original_max_position_embeddings"]
        options["max_position_embeddings"] = round(length)
    return options


def _read_scaling(kind: str, parameters: Mapping[str, Any]) -> Scaling:
    if kind in _BY_LENGTH:
        raise ConversionError(
            f"rope_type={kind!r} cannot be converted: its frequencies change with the length of "
            "the sequence, but cached keys are rotated already"
        )
    if kind not in _SCALINGS:
        known = ", ".join(["default", *_SCALINGS])
        raise ConversionError(f"rope_type={kind!r} cannot be converted; known are {known}")
    fields = dataclasses.fields(_SCALINGS[kind])
    given = {field.name: parameters[field.name] for field in fields if field.name in parameters}
    missing = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.name not in given
    ]
    if missing:
        raise ConversionError(f"rope_type={kind!r} needs {', '.join(missing)}")
    try:
        scaling = _SCALINGS[kind](**given)
        return _with_mscale(scaling, parameters) if isinstance(scaling, YarnScaling) else scaling
    except (TypeError, ValueError) as error:
        raise ConversionError(f"rope_type={kind!r} cannot be converted: {error}") from error


def _with_mscale(scaling: YarnScaling, parameters: Mapping[str, Any]) -> YarnScaling:
    """DeepSeek's two factors, ``mscale`` and ``mscale_all_dim``, as one ``attention_factor``."""
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if scaling.attention_factor is not None or not above or not below:
        return scaling
    growth = 0.1 * math.log(max(scaling.factor, 1.0))
    return dataclasses.replace(
        scaling, attention_factor=(growth * above + 1.0) / (growth * below + 1.0)
    )
