"""`AttentionConfig`: what a model-wide configuration, ``args``, may say about attention."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zeta.values import check_flag, check_positive

# Values that are certainly no configuration, most often an argument in the wrong place.
_NOT_A_CONFIGURATION = (str, bytes, int, float, complex, list, tuple, set, frozenset, Tensor)
_SIMILARITY = 0.85
# Nothing else in a model's configuration begins like this, so a likeness is taken for a slip
# sooner.
_OUR_PREFIX, _SIMILARITY_WITH_OUR_PREFIX = "xpos", 0.6
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The fields of ``args`` that are about attention; every other field is ignored.

    Attributes:
        multiway: Separate parameters for different tokens. False: one way; True: two, ``A`` and
            ``B``; a number: that many.
        layernorm_eps: Of every norm of the module: added to the variance or the mean square; of
            ``qk_norm="l2"`` the least norm.
        xpos_rel_pos: Rotate queries and keys by xPos. Self-attention only.
        xpos_scale_base: Positions over which a feature of xPos decays by its factor.
        flash_attention: Accepted for the sake of existing configurations; the fused path is always
            on.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A number is out of range.
    """

    multiway: bool | int = False
    layernorm_eps: float = 1e-5
    xpos_rel_pos: bool = False
    xpos_scale_base: float = 512
    flash_attention: bool = False

    def __post_init__(self) -> None:
        for name in ("xpos_rel_pos", "flash_attention"):
            check_flag(f"args.{name}", getattr(self, name))
        if not isinstance(self.multiway, int):
            raise TypeError(
                f"args.multiway must be a bool or a number of ways; got {self.multiway!r}"
            )
        if self.multiway < 0:
            raise ValueError(f"args.multiway must not be negative; got {self.multiway}")
        for name in ("layernorm_eps", "xpos_scale_base"):
            check_positive(f"args.{name}", getattr(self, name))

    @property
    def num_ways(self) -> int:
        """Number of parameter sets: 1 without multiway, 2 for True."""
        return self.multiway if self.multiway > 1 else 1 + self.multiway

    @classmethod
    def from_args(cls, args: Any) -> "AttentionConfig":
        """Read ``args``.

        Args:
            args: None (all defaults), a mapping, or any object with attributes: an
                ``argparse.Namespace``, a dataclass, a configuration object of another library.

        Raises:
            TypeError: ``args`` cannot be a configuration, or a field has the wrong type.
            ValueError: A number is out of range, or a field is a misspelt one of ours.
        """
        if args is None:
            return cls()
        if isinstance(args, cls):
            return args
        if isinstance(args, _NOT_A_CONFIGURATION):
            raise TypeError(
                "args must be None, a mapping or an object with attributes; "
                f"got {type(args).__name__} {args!r:.80}"
            )
        fields = [field.name for field in dataclasses.fields(cls)]
        if isinstance(args, Mapping):
            found = {name: args[name] for name in fields if name in args}
            names = [name for name in args if isinstance(name, str)]
        else:
            found = {name: getattr(args, name, _MISSING) for name in fields}
            found = {name: value for name, value in found.items() if value is not _MISSING}
            names = dir(args)
        _refuse_misspelt(names, [name for name in fields if name not in found])
        return cls(**found)


def _refuse_misspelt(names: list[str], unset: list[str]) -> None:
    """Raise ValueError if one of ``names`` is nearly one of ours that is not there."""
    plain = {_plain(name): name for name in unset}
    for name in names:
        # One of ours may be declared, as in a class, and have no value.
        if name.startswith("_") or name in unset:
            continue
        candidate = _plain(name)
        ours = candidate.startswith(_OUR_PREFIX)
        cutoff = _SIMILARITY_WITH_OUR_PREFIX if ours else _SIMILARITY
        for close in difflib.get_close_matches(candidate, plain, n=1, cutoff=cutoff):
            if ours or abs(len(close) - len(candidate)) <= 2:
                raise ValueError(f"args has no field {name!r}; did you mean {plain[close]!r}?")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
