"""Tables that translate the keys of foreign state dicts into ours."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]


class KeyRule(NamedTuple):
    """What becomes of the keys that match a pattern as a whole."""

    pattern: str
    """A regular expression."""
    target: str | Callable[[re.Match], str] | None
    """Our key, as ``re.Match.expand`` or a function understands it; None: nothing here corresponds to the entry."""
    transform: Transform | None = None
    """Brings the tensor into our layout."""
    optional: bool = False
    """Not every model has this entry: it is left out where the model has no place for it."""


class Translation(NamedTuple):
    """A state dict in our keys, and what became of the rest."""

    state_dict: dict[str, Any]
    source_keys: dict[str, str]
    """Our key -> the key that it came from."""
    ignored: list[str]
    """Foreign keys that carry nothing the model needs."""
    unknown: list[str]
    """Foreign keys that no rule matches."""


def find_rule(key: str, rules: Sequence[KeyRule]) -> KeyRule | None:
    """The first rule that matches the whole key."""
    return next((rule for rule in rules if re.fullmatch(rule.pattern, key)), None)


def translate_key(key: str, rule: KeyRule) -> str | None:
    """Our key for a foreign one that the rule matches; None if nothing corresponds to it."""
    if rule.target is None:
        return None
    match = re.fullmatch(rule.pattern, key)
    return match.expand(rule.target) if isinstance(rule.target, str) else rule.target(match)


def translate_state_dict(
    state_dict: Mapping[str, Any], rules: Sequence[KeyRule], model_keys: Container[str] | None = None
) -> Translation:
    """Translate every entry of a foreign state dict.

    Args:
        state_dict: foreign key -> tensor.
        rules: the first one that matches a key counts.
        model_keys: the model's keys, which decide about optional entries; None keeps them all.
    """
    result = Translation({}, {}, [], [])
    for key, value in state_dict.items():
        rule = find_rule(key, rules)
        if rule is None:
            result.unknown.append(key)
            continue
        target = translate_key(key, rule)
        if target is None or (rule.optional and model_keys is not None and target not in model_keys):
            result.ignored.append(key)
            continue
        result.state_dict[target] = value if rule.transform is None else rule.transform(value)
        result.source_keys[target] = key
    return result
