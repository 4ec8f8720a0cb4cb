"""Which modules of a model get an adapter.

A target is one of these:

    model.layers.0.mlp.up_proj   the full name of a module
    up_proj, mlp.up_proj         the end of names, from a dot on
    model.layers.1?.*            a shell pattern of full names, with *, ? or [...]
    all-linear                   PEFT's word: every linear module but the output head

Ends of names and all-linear stay within the text decoder, since rows of text do not reach the rest,
such as the tower of a model that also takes images. Full names and patterns reach every module, but
for the head and the pooler of a model for sequence classification.
"""

import fnmatch
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from astra.errors import AstraError

ALL_LINEAR = "all-linear"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class TargetMatch(NamedTuple):
    """What targets name in a model."""

    linears: dict[str, nn.Linear]  # name -> module that gets an adapter, in the model's order
    # Name -> why it gets none, of other modules and parameters that bear a target's name.
    skipped: dict[str, str]


def find_targets(
    model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """Return the modules that get an adapter, in the model's order; see `match_targets`."""
    return match_targets(model, targets, exclude).linears


def match_targets(
    model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = ()
) -> TargetMatch:
    """Match every module of `model` with `targets`.

    A module that is not an nn.Linear gets no adapter, nor one whose weight is tied to another
    module: replacing it by `W_res` would change the other.

    Args:
        exclude: what gets no adapter although a target names it, in the same words.

    Raises:
        AstraError: a target names no module that can have an adapter, an exclusion names no module,
            or nothing is left.
    """
    names = [name for name, _ in model.named_modules() if name]
    for word in exclude:
        if word != ALL_LINEAR and not any(names_module(word, name) for name in names):
            raise AstraError(f"{word!r} matches no module; correct it or leave it out", "exclude")
    reasons = _find_reasons(model)
    head = _find_head(model)
    linears: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    useful: set[str] = set()  # targets that name a module with an adapter, or an excluded one
    first_skipped: dict[str, str] = {}  # target -> a module that it names
    for name, module in model.named_modules():
        hits = [word for word in targets if _hits(word, name, module, head)]
        if not hits:
            continue
        if any(_hits(word, name, module, head) for word in exclude):
            useful.update(hits)
            continue
        reason = reasons.get(name)
        if reason == OUTSIDE and any(word == name or is_pattern(word) for word in hits):
            reason = None
        if reason is None:
            linears[name] = module
            useful.update(hits)
        else:
            skipped[name] = reason
            for word in hits:
                first_skipped.setdefault(word, name)
    skipped |= _find_fused(model, targets, exclude)
    for word in targets:
        if word not in useful:
            _refuse_target(model, word, first_skipped.get(word), skipped)
    if not linears:
        raise AstraError("every module that the targets name is excluded", "exclude")
    return TargetMatch(linears, skipped)


POOLER = "pooler"  # part of a module's name
OF_CLASSIFIER = "of the classifier's head or pooler, which get no adapter"
OUTSIDE = "outside of the text decoder"


def is_pattern(word: str) -> bool:
    """Return whether a target is a shell pattern."""
    return any(sign in word for sign in "*?[")


def names_module(word: str, name: str) -> bool:
    """Return whether a full name, an end of names or a pattern names the module `name`."""
    if is_pattern(word):
        return fnmatch.fnmatchcase(name, word)
    return f".{name}".endswith(f".{word}")


def _hits(word: str, name: str, module: nn.Module, head: str | None) -> bool:
    """Return whether a target or an exclusion names a module.

    Patterns name linear modules only: others that they match are meant by nobody.
    """
    if word == ALL_LINEAR:
        return isinstance(module, nn.Linear) and name != head
    if is_pattern(word) and not isinstance(module, nn.Linear):
        return False
    return names_module(word, name)


def _find_head(model: nn.Module) -> str | None:
    """Return the name of the output head, None where the model does not say."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return next((name for name, module in model.named_modules() if module is head), None)


def _find_reasons(model: nn.Module) -> dict[str, str]:
    """Return name -> why the module can have no adapter, of every module for which that is so."""
    num_users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            num_users[id(parameter)] = num_users.get(id(parameter), 0) + 1
    inside = {id(module) for module in _get_decoder(model).modules()}
    head, renamed = _find_head(model), _find_renamed(model)
    of_classifier = _find_classifier(model)
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            reasons[name] = f"a {type(module).__name__}, not a linear layer"
        elif id(module) in of_classifier:
            reasons[name] = OF_CLASSIFIER
        elif num_users[id(module.weight)] > 1:
            reasons[name] = "tied to another module"
        elif name.rsplit(".", 1)[-1] in renamed:
            reasons[name] = "named like the fused experts, which PEFT would adapt instead"
        elif id(module) not in inside and name != head:
            reasons[name] = OUTSIDE
    return reasons


def is_of_pooler(name: str) -> bool:
    """Return whether a module or parameter is a pooler, or a part of one."""
    return POOLER in name.split(".")


def _find_classifier(model: nn.Module) -> set[int]:
    """Return the ids of the modules of a classifier's head and pooler; empty for other models."""
    if "ForSequenceClassification" not in type(model).__name__:
        return set()
    inside = {id(module) for module in model.base_model.modules()}
    found = set()
    for name, module in model.named_modules():
        if id(module) not in inside or is_of_pooler(name):
            found.add(id(module))
    return found


def _get_decoder(model: nn.Module) -> nn.Module:
    """Return the text decoder, or the model itself where it does not say.

    transformers' function is a best effort, and returns the model itself where it finds none.
    """
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _find_renamed(model: nn.Module) -> set[str]:
    """Return the last parts of names that PEFT does not take for modules of this model.

    Where transformers 5 fuses experts, PEFT 0.21 takes `gate_proj` in an adapter's config for the
    fused tensor, and there is no way to name the module of a shared expert or of a dense layer.
    """
    renamed = set()
    for word in _list_linear_suffixes(model):
        config = LoraConfig(target_modules=[word])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of two names that only go together
            renamed.add(word)
        if word not in config.target_modules:
            renamed.add(word)
    return renamed


def _find_fused(model: nn.Module, targets: Sequence[str], exclude: Sequence[str]) -> dict[str, str]:
    """Return the tensors that hold the matrices of several modules, experts mostly, by name.

    `gate_up_proj` bears the names of the targets gate_proj and up_proj.
    """
    fused = {}
    inside = {id(module) for module in _get_decoder(model).modules()}
    for prefix, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS) or id(module) not in inside:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}"
            # Sharded parameters have their whole shape elsewhere, so this is done before sharding.
            if parameter.dim() < 3 or 1 in parameter.shape:
                continue
            if any(_bears(word, name) for word in targets) and not any(
                _bears(word, name) for word in exclude
            ):
                fused[name] = "matrices of all experts in one tensor"
    return fused


def _bears(word: str, name: str) -> bool:
    """Return whether the name of a fused tensor has all parts of a target's name."""
    if word == ALL_LINEAR:
        return True
    if is_pattern(word):
        return fnmatch.fnmatchcase(name, word)
    parts = name.rsplit(".", 1)[-1].split("_")
    return set(word.rsplit(".", 1)[-1].split("_")) <= set(parts)


def _refuse_target(model: nn.Module, word: str, name: str | None, skipped: dict[str, str]) -> None:
    """Raise AstraError for a target that gives no module an adapter.

    Args:
        name: a module that it names, if there is one.
    """
    if name is not None and skipped[name] == OUTSIDE:
        raise AstraError(
            f"{word!r} names modules {OUTSIDE} only, such as {name}; leave it out, or give a "
            f"pattern, '*.{word}'",
            "targets",
        )
    if name is not None:
        raise AstraError(f"{name} is {skipped[name]}; leave it out", "targets")
    fused = [tensor for tensor in skipped if _bears(word, tensor)]
    fused_hint = f", only the fused tensor {fused[0]}, which can have no adapter" if fused else ""
    known = ", ".join(_list_linear_suffixes(model))
    raise AstraError(
        f"{word!r} matches no module{fused_hint}; linear modules here: {known}", "targets"
    )


def _list_linear_suffixes(model: nn.Module) -> list[str]:
    """Return the last parts of the names of all linear layers, sorted."""
    suffixes = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            suffixes.add(name.rsplit(".", 1)[-1])
    return sorted(suffixes)


def make_peft_targets(
    model: nn.Module, targets: Sequence[str], linears: Collection[str]
) -> list[str] | str:
    """Return a `target_modules` with which PEFT adapts the modules `linears` and no others.

    The targets themselves, where they match no other module; else the full names; else, where one
    of those is the end of another module's name, a regular expression.
    """
    names = [name for name, _ in model.named_modules()]
    wanted = set(linears)
    for words in (list(targets), list(linears)):
        ends = {f".{word}" for word in words}
        found = {name for name in names if _has_end(name, ends)}
        if found == wanted:
            return words
    return "|".join(re.escape(name) for name in linears)


def _has_end(name: str, ends: set[str]) -> bool:
    """Return whether `name`, from one of its dots on, is one of `ends`."""
    parts = name.split(".")
    return any(f".{'.'.join(parts[i:])}" in ends for i in range(len(parts)))


def abbreviate_name(name: str) -> str:
    """Return a name with `*` in the place of numbers: that of its kind, which is a pattern too."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
