"""Attentions of other libraries to Zeta's and back, with a proof: modules and state dicts."""

from zeta.convert.checking import check
from zeta.convert.checkpoints import Converted, convert_state_dict
from zeta.convert.errors import ConversionError
from zeta.convert.modules import from_module, to_module
from zeta.convert.report import Case, Report
from zeta.convert.t5 import relative_position_bias

__all__ = [
    "Case",
    "ConversionError",
    "Converted",
    "Report",
    "check",
    "convert_state_dict",
    "from_module",
    "relative_position_bias",
    "to_module",
]
