"""`swap`: the attentions of a model become Zeta's, in place.

What can be replaced is found first, and new modules are made; the model is changed when nothing can
go wrong any more.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from zeta.convert.errors import ConversionError
from zeta.convert.forms import PROJECTIONS
from zeta.convert.modules import from_module
from zeta.convert.registry import SOURCES, recognise
from zeta.convert.source import qualified_name
from zeta.integrations import pytorch
from zeta.nn import MultiheadAttention, MultiwayNetwork

_PARTS = (*PROJECTIONS, "inner_attn_ln")
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)

_KNOWN = frozenset(name for source in SOURCES.values() for name in source.classes)
_TRANSFORMERS = (
    "Transformers computes by an interface of its own: use zeta.integrations.huggingface, then "
    'model.set_attn_implementation("zeta")'
)

_OTHER_CALLS = (
    "its calls are not those of zeta.nn.MultiheadAttention: convert it with "
    "zeta.convert.from_module, and change the calls"
)


@dataclass(frozen=True)
class Replaced:
    """An attention that is Zeta's now.

    Attributes:
        names: Under which the model has it; ``""`` is the model itself.
        before: The class it was of.
        after: The class it is of.
    """

    names: tuple[str, ...]
    before: str
    after: str

    def __str__(self) -> str:
        return f"{_spoken(self.names)}: {self.before} is now {self.after}"


@dataclass(frozen=True)
class Kept:
    """An attention that is what it was.

    Attributes:
        names: Under which the model has it; ``""`` is the model itself.
        kind: The class it is of.
        reason: Why it was not replaced.
    """

    names: tuple[str, ...]
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{_spoken(self.names)}: {self.kind}: {self.reason}"


@dataclass(frozen=True)
class Swapped:
    """What `swap` did, and what it left and why; print it.

    Attributes:
        replaced: In the order of the model's modules.
        kept: Attentions, and modules that are called so, in the same order.
    """

    replaced: tuple[Replaced, ...]
    kept: tuple[Kept, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.kept)} kept"]
        lines += [f"  replaced {entry}" for entry in self.replaced]
        lines += [f"  kept     {entry}" for entry in self.kept]
        return "\n".join(lines)


def swap(model: nn.Module, *, weights: pytorch.Weights = "zeta") -> Swapped:
    """Replace every attention in a model by Zeta's, in place.

    A ``torch.nn.MultiheadAttention`` becomes a `zeta.integrations.pytorch.MultiheadAttention`, a
    subclass of it: the object stays the same. TorchScale's makes place for a
    `zeta.nn.MultiheadAttention`, with the same submodules. Either way parameters are the same
    objects, so that optimizers go on; state dicts have the same keys; hooks, devices, dtypes,
    training mode and ``requires_grad`` are kept; an attention that the model has under two names is
    replaced once and is still one. When an error is raised, the model is as it was.

    Args:
        model: It is changed. Compile, quantise, parametrise or shard it afterwards.
        weights: ``"torch"``: where torch's attention returns weights in training, those after
            dropout, as torch does; ``"zeta"``: those before.

    Returns:
        What was replaced, and what was not, with reasons.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``weights`` is unknown, or the model itself is an attention that can only be
            replaced inside another module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    pytorch.check_weights(weights)
    replaced: list[Replaced] = []
    kept: list[Kept] = []
    changes: list[Callable[[], object]] = []
    for module, names in _by_names(model):
        judged = _judge(module)
        if judged is None:
            continue
        before = _class_name(module)
        if isinstance(judged, str):
            kept.append(Kept(names, before, judged))
            continue
        if isinstance(judged, MultiheadAttention):
            if module is model:
                raise ValueError(
                    f"model is itself a {before}, which can only be replaced inside another "
                    "module; zeta.convert.from_module(model) makes one of Zeta's"
                )
            changes.append(partial(_put, judged, module, model, names))
            after = qualified_name(MultiheadAttention)
        else:
            changes.append(partial(pytorch.adopt, judged, weights))
            after = qualified_name(pytorch.MultiheadAttention)
        replaced.append(Replaced(names, before, after))
    for change in changes:
        change()
    return Swapped(tuple(replaced), tuple(_innermost(kept, replaced)))


def _by_names(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Each module once, with all names under which the model has it."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return ((module, tuple(found)) for module, found in names.items())


def _judge(module: nn.Module) -> nn.MultiheadAttention | MultiheadAttention | str | None:
    """What becomes of a module.

    Returns:
        The module itself, which is to be adopted; another one, its replacement; a text, the reason
        why it stays; None: it is no attention.
    """
    if isinstance(module, MultiheadAttention | pytorch.MultiheadAttention):
        return "it is Zeta's already"
    if isinstance(module, nn.MultiheadAttention):
        return pytorch.obstacle(module) or module
    if not _KNOWN.isdisjoint(map(qualified_name, type(module).__mro__)):
        try:
            return _judge_known(module)
        except ConversionError as error:
            return str(error)
    if "attention" not in _class_name(module).rpartition(".")[2].lower():
        return None
    return _TRANSFORMERS if _is_of_transformers(module) else "Zeta does not know this class"


def _judge_known(module: nn.Module) -> MultiheadAttention | str:
    """`_judge` of a module of a class that `from_module` knows; raises ConversionError likewise."""
    kind = recognise(module).kind
    # Of zetascale's two modules, the one that is built from `args` returns a tuple.
    if kind == "torchscale" or (kind == "zetascale" and hasattr(module, "args")):
        return from_module(module)
    if kind == "zetascale":
        return "it returns the output alone, and zeta.nn.MultiheadAttention the weights too"
    return _TRANSFORMERS if _is_of_transformers(module) else _OTHER_CALLS


def _is_of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "transformers"


def _put(new: MultiheadAttention, old: nn.Module, model: nn.Module, names: tuple[str, ...]) -> None:
    """Put a converted attention in the place of the one it was made of, around its submodules."""
    for name in _PARTS:
        ours, theirs = getattr(new, name), getattr(old, name)
        if isinstance(ours, MultiwayNetwork):
            for way in ("A", "B"):
                ours.register_module(way, getattr(theirs, way))
            _carry_hooks(theirs, ours)
        elif ours is not None:
            new.register_module(name, theirs)
    _carry_hooks(old, new)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).register_module(leaf, new)


def _carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Share the dicts of hooks, so that the handles of the old module's remove the new one's."""
    vars(new).update({name: hooks for name, hooks in vars(old).items() if name in _HOOKS})
    hooks: list[Any] = list(new._load_state_dict_pre_hooks.values())
    for hook in hooks:
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)


def _innermost(kept: Sequence[Kept], replaced: Sequence[Replaced]) -> Iterator[Kept]:
    """Without the modules that are called attentions and have some inside."""
    entries: list[Kept | Replaced] = [*kept, *replaced]
    inside = [name for entry in entries for name in entry.names]
    for entry in kept:
        prefixes = [f"{name}." if name else "" for name in entry.names]
        if not any(name.startswith(prefix) for name in inside if name for prefix in prefixes):
            yield entry


def _class_name(module: nn.Module) -> str:
    # A module of TorchScript's remembers the class that it was made of.
    original = getattr(module, "original_name", None)
    name = qualified_name(type(module))
    return f"{name}.{original}" if isinstance(original, str) else name


def _spoken(names: Sequence[str]) -> str:
    return ", ".join(name or "the model itself" for name in names)
