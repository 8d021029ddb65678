"""The description of a model in its weights file, with which the file can be used alone.

The description is a mapping of strings, as safetensors has room for: "config" (YAML: what differs from the defaults),
"classes" (JSON: COCO's categories, in the order of the model's classes) and "knet_d2_version".
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml
from detectron2.config import CfgNode

from ..config.merging import translate_quarter_turns, with_lists
from ..config.options import get_knet_cfg
from ..data.classes import ClassTable, categories, class_table, from_categories, with_classes
from ..errors import CheckpointError
from ..setup.dependencies import VERSION
from .load_report import build_report, find_misfits, recognise
from .loading import as_checkpoint
from .zoo import build_on_meta

# Left out of a description: what belongs to the machine that wrote the file, and data sets that a reader does not need.
_LEFT_OUT = ("OUTPUT_DIR", "DATASETS", "MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.COMPILE")
# Sections that a reader uses; the other sections document the training run.
_MODEL_SECTIONS = ("MODEL", "INPUT", "TEST")
# Limits against hostile files. Our own descriptions have a few thousand letters, no alias and at most 4 levels.
_MOST_LETTERS, _MOST_ALIASES, _MOST_LEVELS = 100_000, 20, 20
_MOST_CLASS_LETTERS = 4_000_000
LARGEST_SIZE = 16_384


class ModelDescription(NamedTuple):
    """A model's config, without data sets, weights and device, and its classes."""

    cfg: CfgNode
    classes: ClassTable


def describe_model(cfg: CfgNode, classes: ClassTable | None = None) -> dict[str, str]:
    """The description of a model of ``cfg``; without ``classes``, the data sets of ``cfg`` name them."""
    cfg = with_classes(cfg)
    return {
        "config": yaml.safe_dump(_differences(cfg, get_knet_cfg())),
        "classes": json.dumps(categories(class_table(cfg) if classes is None else classes)),
        "knet_d2_version": VERSION,
    }


def has_description(content: Any) -> bool:
    """Return whether the result of :func:`load_file` contains a description."""
    metadata = content.get("metadata") if isinstance(content, dict) else None
    return isinstance(metadata, dict) and {"config", "classes"} <= set(metadata)


def read_description(content: Any, path: str) -> ModelDescription:
    """Read the description in a weights file.

    Args:
        content: result of :func:`load_file`.
        path: the file's name, for messages.

    Raises:
        CheckpointError: there is no description, one that this version does not understand, or one whose model or
            classes are not those of the file's parameters.
    """
    if not has_description(content):
        raise CheckpointError(
            f"{path}: holds weights only, no config and classes. Name the config that they were trained with "
            "(config_file; --config-file on the command line)."
        )
    metadata, parameters = content["metadata"], as_checkpoint(content, path)["model"]
    with _usable(metadata, path):
        description = _parse_description(metadata)
        model_state = build_on_meta(description.cfg, most_modules=10 * len(parameters) + 1000).state_dict()
        layout = recognise(parameters, model_state)
        misfits = find_misfits(build_report(layout, parameters, model_state), layout, partial=False)
    if misfits:
        raise CheckpointError(
            f"{path}: its parameters are not those of its config: {'; '.join(misfits)}. Name a config_file that fits."
        )
    return description


def read_metadata(metadata: Mapping[str, str], path: str) -> ModelDescription:
    """Read the description in the metadata of an exported file, whose parameters are not known by name.

    Raises:
        CheckpointError: it is not one that this version understands.
    """
    with _usable(metadata, path):
        return _parse_description(metadata)


def _parse_description(metadata: Mapping[str, str]) -> ModelDescription:
    cfg = get_knet_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    config = _parse_config(metadata["config"])
    for key in ("WEIGHTS", "DEVICE", "COMPILE"):
        config.get("MODEL", {}).pop(key, None)
    cfg.merge_from_other_cfg(CfgNode({key: config[key] for key in _MODEL_SECTIONS if key in config}))
    classes = from_categories(_parse_classes(metadata["classes"]))
    _check_numbers(cfg, classes)
    return ModelDescription(cfg, classes)


@contextlib.contextmanager
def _usable(metadata: Mapping[str, str], path: str) -> Iterator[None]:
    try:
        yield
    except (Exception, MemoryError) as e:  # a model of an arbitrary config can raise almost any exception
        reason, version = " ".join(str(e).split())[:500], str(metadata.get("knet_d2_version", "(unknown)"))[:40]
        other_version = "" if version == VERSION else f", or install knet_d2 {version}, which wrote it"
        raise CheckpointError(
            f"{path}: its config and classes can't be used ({reason or type(e).__name__}). Name a config_file that "
            f"fits{other_version}."
        ) from e


def described_classes(content: Mapping[str, Any], path: str) -> ClassTable | None:
    """Return the classes in a weights file; None if it has none, like official checkpoints.

    Args:
        content: result of :func:`load_file`.
        path: the file's name, for messages.

    Raises:
        CheckpointError: its list of classes can't be read.
    """
    if not has_description(content):
        return None
    try:
        classes = from_categories(_parse_classes(content["metadata"]["classes"]))
    except Exception as e:  # an arbitrary list can raise almost any exception
        reason = " ".join(str(e).split())[:500] or type(e).__name__
        raise CheckpointError(f"{path}: its list of classes can't be read ({reason}). Get the file again.") from e
    return classes if classes.has_names else None


def changed_options(metadata: Any, earlier: Any) -> dict[str, tuple[Any, Any]]:
    """Options that differ between two descriptions: key -> (value in the earlier one, value now).

    Raises:
        ValueError, yaml.YAMLError: one of the configs can't be read.
    """
    now, before = (_flat(_parse_config(description["config"])) for description in (metadata, earlier))
    defaults = _flat(get_knet_cfg())
    changed = {}
    for key in sorted(now.keys() | before.keys()):
        values = tuple(config.get(key, defaults.get(key)) for config in (before, now))
        if with_lists(values[0]) != with_lists(values[1]):
            changed[key] = values
    return changed


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, value in config.items():
        items |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items


def _parse_config(text: str) -> dict[str, Any]:
    """Parse a YAML text; refuses texts that need time or memory out of proportion to their length.

    Raises:
        ValueError, yaml.YAMLError: it is no such text.
    """
    if not isinstance(text, str) or len(text) > _MOST_LETTERS:
        raise ValueError(f"the config is no text of at most {_MOST_LETTERS} letters")
    aliases = level = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > _MOST_ALIASES or level > _MOST_LEVELS:
            raise ValueError(f"the config has more than {_MOST_ALIASES} aliases or {_MOST_LEVELS} levels")
    config = yaml.safe_load(text)
    translate_quarter_turns(config)
    return config


def _parse_classes(text: str) -> list[dict[str, Any]]:
    if not isinstance(text, str) or len(text) > _MOST_CLASS_LETTERS:
        raise ValueError(f"the classes are no text of at most {_MOST_CLASS_LETTERS} letters")
    records = json.loads(text)
    for record in records:
        color = record["color"]
        if (
            type(record["id"]) is not int
            or type(record.get("dataset_id", 0)) is not int
            or type(record["name"]) is not str
            or record["isthing"] not in (0, 1)
            or len(color) != 3
            or any(type(x) is not int or not 0 <= x <= 255 for x in color)
        ):
            raise ValueError(f"the class {str(record)[:100]} needs id, name, isthing and color (3 times 0 .. 255)")
    if [bool(x["isthing"]) for x in records] != sorted((bool(x["isthing"]) for x in records), reverse=True):
        raise ValueError("the classes are not sorted, things first")
    return records


def _check_numbers(cfg: CfgNode, classes: ClassTable) -> None:
    """Raise a ValueError where the classes are not those of the config's model, or images can't be prepared for it."""
    knet = cfg.MODEL.KNET
    expected = (knet.NUM_THING_CLASSES, knet.NUM_STUFF_CLASSES)
    found = (classes.num_things, len(classes.names) - classes.num_things)
    if cfg.MODEL.META_ARCHITECTURE != "KNet":
        raise ValueError(f"MODEL.META_ARCHITECTURE = {cfg.MODEL.META_ARCHITECTURE}: must be KNet")
    if expected != found:
        raise ValueError(f"the config has {expected} classes of things and stuff, the list of classes {found}")
    if not 0 <= cfg.INPUT.MIN_SIZE_TEST <= LARGEST_SIZE or cfg.INPUT.MAX_SIZE_TEST <= 0:
        raise ValueError(f"INPUT.MIN_SIZE_TEST must be 0 .. {LARGEST_SIZE}, INPUT.MAX_SIZE_TEST positive")
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
        raise ValueError("MODEL.PIXEL_MEAN must be finite, MODEL.PIXEL_STD finite and positive")


def _differences(cfg: CfgNode, defaults: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of ``cfg`` that differ from the defaults, as nested dicts."""
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        if prefix + key in _LEFT_OUT:
            continue
        if isinstance(value, CfgNode):
            value = _differences(value, defaults.get(key, {}), f"{prefix}{key}.")
            if value:
                found[key] = value
        elif key not in defaults or with_lists(value) != with_lists(defaults[key]):
            found[key] = with_lists(value)
    return found
