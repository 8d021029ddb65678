"""From the command line to a checked, frozen config."""

import contextlib
import difflib
import logging
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode

from ..data import register_custom_datasets, resolve_classes
from ..data.timm_names import fill_pixel_statistics
from ..errors import ConfigError, KNetError
from .files import config_folder, find_config_file
from .options import get_knet_cfg
from .yaml_keys import refuse_repeated_keys

logger = logging.getLogger(__name__)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the file, then ``opts`` (KEY VALUE ...); device and class counts are resolved.

    Raises:
        ConfigError: names the key (and the nearest known one), or the file.
    """
    cfg = get_knet_cfg()
    merge_config(cfg, config_file, opts)
    cfg.MODEL.DEVICE = choose_device(cfg.MODEL.DEVICE, explicit="MODEL.DEVICE" in opts[0::2])
    register_custom_datasets(cfg)
    resolve_classes(cfg)
    fill_pixel_statistics(cfg)
    return cfg


def merge_config(cfg: CfgNode, config_file: str, opts: Sequence[str] = ()) -> None:
    """Merge a YAML file ("" = none) and KEY VALUE pairs into ``cfg``; the file can't run code."""
    flags = [x for x in opts if str(x).startswith("--")]
    if flags:
        raise ConfigError(f"{flags[0]} is among the KEY VALUE pairs, which end the line: put it before them.")
    if len(opts) % 2:
        raise ConfigError(f"Options come as KEY VALUE pairs; {opts[-1]!r} has no value.")
    defaults = _flat_items(cfg)
    known = list(defaults)
    if config_file:
        config_file = find_config_file(config_file)
        with _clear_errors(config_file, known):
            refuse_repeated_keys(config_file)
            loaded = cfg.load_yaml_with_base(config_file)
            if loaded.setdefault("VERSION", cfg.VERSION) != cfg.VERSION:
                raise ValueError(f"VERSION is {loaded['VERSION']}: only configs of version {cfg.VERSION} can be read.")
            translate_quarter_turns(loaded)
            cfg.merge_from_other_cfg(CfgNode(_with_floats(loaded, cfg)))
            _refuse_null(cfg, defaults)
    for key, value in zip(opts[0::2], opts[1::2]):
        with _clear_errors("command line", known):
            cfg.merge_from_list([key, _with_floats(value, defaults.get(key))])
            _refuse_null(cfg, defaults)


def translate_quarter_turns(config: dict[str, Any]) -> None:
    """Replace INPUT.QUARTER_TURNS, which files of earlier states of the package have, by its INPUT.AUGMENTATIONS."""
    section, default, turns = config.get("INPUT", {}), {"name": "Default"}, {"name": "RandomQuarterTurns"}
    if "QUARTER_TURNS" in section:
        is_on, others = section.pop("QUARTER_TURNS"), section.get("AUGMENTATIONS", [default])
        others = [entry for entry in others if entry != turns]
        section["AUGMENTATIONS"] = [*others, turns] if is_on and default in others else others


def _with_floats(value: Any, default: Any) -> Any:
    """Return a value, or a tree of values, with integers converted to floats where the default is a float."""
    if isinstance(value, dict) and isinstance(default, CfgNode):
        return {key: _with_floats(x, default.get(key)) for key, x in value.items()}
    if isinstance(default, float) and re.fullmatch(r"[+-]?\d+", str(value)):
        return float(value)
    return value


def _refuse_null(cfg: CfgNode, defaults: dict[str, Any]) -> None:
    """Raise a ValueError if null has replaced another default, which yacs allows."""
    for key, value in _flat_items(cfg).items():
        if value is None and defaults[key] is not None:
            raise ValueError(f"{key} is null; its default is {str(defaults[key])[:60]}.")


@contextlib.contextmanager
def _clear_errors(source: str, known: list[str]) -> Iterator[None]:
    """Convert the errors of yacs and the YAML reader to a ConfigError with the key and the most similar known key."""
    yacs_logger = logging.getLogger("yacs.config")  # logs each failed assertion before it is raised
    level = yacs_logger.level
    yacs_logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{source}: it holds no mapping of keys to values as configs do ({error}).") from error
    except (KeyError, ValueError, AssertionError, OSError, RecursionError, yaml.YAMLError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        if isinstance(error, FileNotFoundError):
            text += f". _BASE_ is relative to the file that has it; the configs of knet_d2 are in {config_folder()}."
        unknown = re.match(r"Non-existent (?:config )?key: (\S+)", text)
        if unknown:
            text = f"unknown config key {unknown.group(1)}.{_suggestion(unknown.group(1), known)}"
        raise ConfigError(f"{source}: {' '.join(text.split())}") from error
    finally:
        yacs_logger.setLevel(level)


@contextlib.contextmanager
def config_to_blame(what: str) -> Iterator[None]:
    """Convert any error of a library, while something is built from a config, to a ConfigError.

    Args:
        what: name of what is built, for the message.
    """
    try:
        yield
    except KNetError:
        raise
    except (Exception, MemoryError) as error:
        logger.debug("%s could not be built:", what, exc_info=True)
        reason = " ".join(str(error).split()) or f"a check of {_place_of(error)} fails"
        raise ConfigError(
            f"{what} can't be built from this config ({type(error).__name__}: {reason}). Compare the options that it "
            "sets with knet docs CONFIG."
        ) from error


def _place_of(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{os.path.basename(frame.filename)}, line {frame.lineno}, `{frame.line}`"


def _suggestion(key: str, known: list[str]) -> str:
    if key == "INPUT.QUARTER_TURNS":
        return " Add {name: RandomQuarterTurns} to INPUT.AUGMENTATIONS."
    last = key.rsplit(".", 1)[-1]
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == last]
    nearest = difflib.get_close_matches(key, same_name or known, n=1, cutoff=0.0 if same_name else 0.6)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def with_lists(value: Any) -> Any:
    """Return a value with lists in place of tuples, at every level: YAML has no tuples, so that they are equal."""
    if isinstance(value, dict):
        return {key: with_lists(x) for key, x in value.items()}
    return [with_lists(x) for x in value] if isinstance(value, list | tuple) else value


def _flat_items(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return all values and nodes by their full keys."""
    items = {}
    for key, value in cfg.items():
        items[prefix + key] = value
        if isinstance(value, CfgNode):
            items |= _flat_items(value, f"{prefix}{key}.")
    return items


def choose_device(device: str, explicit: bool) -> str:
    """Return ``device``; without a CUDA GPU, MPS or the CPU in its place.

    Raises:
        ConfigError: there is no CUDA GPU, although the command line names one (``explicit``).
    """
    if not device.startswith("cuda") or torch.cuda.is_available():
        return device
    if explicit:
        raise ConfigError(f'MODEL.DEVICE is "{device}", but PyTorch sees no CUDA GPU; use "cpu".')
    found = "mps" if torch.backends.mps.is_available() else "cpu"
    logger.info(f'No CUDA GPU: MODEL.DEVICE "{device}" is replaced by "{found}".')
    return found
