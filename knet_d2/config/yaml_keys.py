"""Refuses config files in which a key occurs twice; YAML's reader would silently take its last value."""

import os

import yaml


def refuse_repeated_keys(path: str) -> None:
    """Check a config file and the files that it is based on (``_BASE_``).

    Raises:
        ValueError: a mapping has a key twice; names both lines.
        OSError, yaml.YAMLError: a file can't be read.
    """
    files, seen = [path], set()
    while files:
        file = files.pop()
        if file in seen:
            continue
        seen.add(file)
        if os.path.exists(file) and not os.path.isfile(file):  # a named pipe or a device would never end
            raise ValueError(f"{file} is no file. Correct _BASE_.")
        with open(file) as f:
            root = yaml.compose(f, Loader=yaml.SafeLoader)
        _check(root, "" if file == path else f"{file}: ")
        files += [x for x in _bases(root, os.path.dirname(file)) if "://" not in x]


def _bases(root: yaml.Node | None, folder: str) -> list[str]:
    """Paths of the files that a config is based on."""
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    for key, value in pairs:
        if key.value == "_BASE_":
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            return [os.path.join(folder, os.path.expanduser(str(node.value))) for node in nodes]
    return []


def _check(root: yaml.Node | None, where: str) -> None:
    nodes, seen = [(root, "")], set()
    while nodes:
        node, prefix = nodes.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += [(item, f"{prefix}{i}.") for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines and key.value != "<<":
                raise ValueError(
                    f"{where}{prefix}{key.value} stands twice, in line {lines[name]} and line {line}. Remove one."
                )
            lines[name] = line
            nodes.append((value, f"{prefix}{key.value}."))
