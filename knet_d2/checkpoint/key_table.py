"""Translates the keys of state dicts from other libraries into our keys, by tables of rules."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]


class KeyRule(NamedTuple):
    """A rule for all keys that match a pattern.

    Attributes:
        pattern: regular expression that matches the whole key.
        target: our key: a template for ``re.Match.expand`` or a function of the match; None: our models have no such
            entry.
        transform: converts the tensor to our layout.
        optional: whether the entry is ignored if the model does not have our key.
    """

    pattern: str
    target: str | Callable[[re.Match], str] | None
    transform: Transform | None = None
    optional: bool = False


class Translation(NamedTuple):
    """A translated state dict.

    Attributes:
        state_dict: our key -> tensor.
        source_keys: our key -> original key.
        ignored: original keys that the model does not need.
        unknown: original keys that match no rule.
    """

    state_dict: dict[str, Any]
    source_keys: dict[str, str]
    ignored: list[str]
    unknown: list[str]


def find_rule(key: str, rules: Sequence[KeyRule]) -> KeyRule | None:
    """Return the first rule that matches the whole key; None if there is none."""
    return next((rule for rule in rules if re.fullmatch(rule.pattern, key)), None)


def translate_key(key: str, rule: KeyRule) -> str | None:
    """Return our key for an original key that matches the rule; None if our models have no such entry."""
    if rule.target is None:
        return None
    match = re.fullmatch(rule.pattern, key)
    return match.expand(rule.target) if isinstance(rule.target, str) else rule.target(match)


def translate_state_dict(
    state_dict: Mapping[str, Any], rules: Sequence[KeyRule], model_keys: Container[str] | None = None
) -> Translation:
    """Translate every entry of a state dict from another library.

    Args:
        state_dict: original key -> tensor.
        rules: rules; the first one that matches a key is applied.
        model_keys: keys of the model, for optional entries; None keeps all optional entries.
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
