"""What a config may say of timm's networks: their names, and the normalisation of images that their weights expect."""

import difflib
from types import ModuleType
from typing import Any

from detectron2.config import CfgNode

from ..errors import ConfigError
from ..setup.registry_weights import REGISTRY_WEIGHTS


def import_timm() -> ModuleType:
    """timm.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import timm
    except ImportError as e:
        raise ConfigError(
            "MODEL.BACKBONE.NAME: it needs the package timm. Install it with: python -m pip install timm"
        ) from e
    return timm


def pretrained_statement(name: str) -> Any:
    """What timm states of the weights of a network ("resnet50", "resnet50.a1_in1k"); None if it states nothing.

    Raises:
        ConfigError: timm has no such network, or no such weights of it; says the nearest names.
    """
    timm = import_timm()
    network = name.partition(".")[0]
    known = timm.list_models()
    if timm.is_model(name):
        try:
            return timm.get_pretrained_cfg(name)
        except RuntimeError:  # what follows the dot
            known = [x for x in timm.list_pretrained(f"{network}*") if x.partition(".")[0] == network] or [network]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    raise ConfigError(f"MODEL.TIMM.NAME = {name!r}: timm has no such network. The nearest names are {nearest}.")


def fill_pixel_statistics(cfg: CfgNode) -> None:
    """Replace MODEL.PIXEL_MEAN and PIXEL_STD that are [] by what the weights of MODEL.TIMM.NAME state (in place).

    The order of the channels is that of INPUT.FORMAT; a grey image gets the mean over the colours.

    Raises:
        ConfigError: nothing is stated for the images of this config.
    """
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) == 0:
            cfg.MODEL[key] = _in_format(stated_statistics(cfg)[key], cfg.INPUT.FORMAT, key)


def stated_statistics(cfg: CfgNode) -> dict[str, list[float]]:
    """PIXEL_MEAN and PIXEL_STD of a network's pretrained weights, RGB, on the scale from 0 to 255."""
    name = cfg.MODEL.TIMM.NAME
    if not cfg.MODEL.BACKBONE.NAME.startswith("build_timm_"):
        raise ConfigError("MODEL.PIXEL_MEAN or PIXEL_STD = []: only a backbone of timm states them. Give numbers.")
    for weights in REGISTRY_WEIGHTS.values():
        if weights.network == name.partition(".")[0]:  # their own statement, where timm's differs by half a grey value
            return {"PIXEL_MEAN": list(weights.pixel_mean), "PIXEL_STD": list(weights.pixel_std)}
    stated = pretrained_statement(name)
    if stated is None:
        raise ConfigError(f"MODEL.PIXEL_MEAN = []: timm states no normalisation for {name!r}. Give numbers.")
    return {"PIXEL_MEAN": [255 * x for x in stated.mean], "PIXEL_STD": [255 * x for x in stated.std]}


def _in_format(values: list[float], image_format: str, key: str) -> list[float]:
    orders = {"RGB": values, "BGR": values[::-1], "L": [sum(values) / len(values)]}
    if image_format not in orders:
        raise ConfigError(f"MODEL.{key} = []: the weights state it for colours. Give numbers for {image_format!r}.")
    return orders[image_format]
