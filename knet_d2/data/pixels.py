"""What INPUT.FORMAT and INPUT.VALUE_RANGE mean: from the pixels of any file or array to those that the model takes.

Shapes: H x W the image, C its channels. Whatever the type of a file is, the model sees numbers from 0 to 255.
"""

from __future__ import annotations

import logging
import math
import re
from typing import NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n
from PIL import Image

from ..errors import ConfigError, DataError

_NAMED = {"L": 1, "RGB": 3, "BGR": 3}
_TYPE_RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)} | {f"float{x}": (0.0, 1.0) for x in (16, 32, 64)}
# Pillow's weights of red, green and blue in a grey value, parts of 65536
_LUMINANCE = np.array([19595, 38470, 7471], np.float32) / 65536
# Distance from a whole number that is a rounding error of float32
_ROUNDING = 1e-3


class PixelFormat(NamedTuple):
    """How images are given to a model.

    Attributes:
        name: "RGB", "BGR", "L" (grey), or "5-channel" for images of 5 channels, whatever they are.
        value_range: lowest and highest value in a file, which become 0 and 255; None: those of its type, which are 0
            and 255 (uint8), 0 and 65535 (uint16), 0 and 1 (floats).
    """

    name: str
    value_range: tuple[float, float] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> PixelFormat:
        """From INPUT.

        Raises:
            ConfigError: a key has a value that makes no sense, or MODEL.PIXEL_MEAN is of another number of channels.
        """
        name, values = cfg.INPUT.FORMAT, list(cfg.INPUT.VALUE_RANGE)
        if not (name in _NAMED or re.fullmatch(r"[1-9]\d{0,3}-channel", name)):
            raise ConfigError(f"INPUT.FORMAT = {name!r}: use 'RGB', 'BGR', 'L' (grey), or as '5-channel' any number.")
        is_range = len(values) == 2 and all(type(x) in (int, float) and math.isfinite(x) for x in values)
        if values and not (is_range and values[0] < values[1]):
            raise ConfigError(
                f"INPUT.VALUE_RANGE = {values}: give the lowest and the highest value in the files, as [0, 4095], or "
                "[] for the range of their type."
            )
        found = cls(name, (float(values[0]), float(values[1])) if values else None)
        for key in ("PIXEL_MEAN", "PIXEL_STD"):
            if len(cfg.MODEL[key]) not in (0, found.channels):  # none: fill_pixel_statistics gives them
                raise ConfigError(
                    f"MODEL.{key} = {list(cfg.MODEL[key])}: give {found.channels} numbers, one for each channel of "
                    f"INPUT.FORMAT {name!r}, on the scale from 0 to 255."
                )
        return found

    @property
    def is_named(self) -> bool:
        """Whether the channels are colours, so that grey can become colour, colour grey, and alpha is dropped."""
        return self.name in _NAMED

    @property
    def channels(self) -> int:
        """C."""
        return _NAMED[self.name] if self.is_named else int(self.name.partition("-")[0])

    @property
    def as_rgb(self) -> PixelFormat:
        """The same with colours in RGB order."""
        return self._replace(name="RGB") if self.name == "BGR" else self

    def prepare(self, pixels: np.ndarray, source: str, order: str = "RGB") -> np.ndarray:
        """What the model takes: uint8 or float32 [H, W, C], from 0 to 255.

        Args:
            pixels: of any type of numbers, [H, W] or [H, W, channels].
            source: what they are from, for the messages.
            order: "RGB" or "BGR", of three channels that are colours.

        Raises:
            DataError: they are no image of this format.
        """
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.ndim != 3 or not pixels.size or pixels.dtype.kind not in "uif":
            raise DataError(
                f"{source}: {pixels.dtype} {list(pixels.shape)} is no image; expected integers or floats [height, "
                f"width, {self.channels}]."
            )
        return self.arrange(self._scale(pixels, source), source, order)

    def arrange(self, image: np.ndarray, source: str, order: str = "RGB") -> np.ndarray:
        """:meth:`prepare` for an image [H, W, channels] that is on the scale from 0 to 255."""
        count = image.shape[2]
        if self.name == "L" and count == 3:
            return self._grey(image if order == "RGB" else image[:, :, ::-1])
        if self.name in ("RGB", "BGR") and count == 1:
            return np.repeat(image, 3, axis=2)
        if count != self.channels:
            raise self.wrong_channels(count, source)
        return image[:, :, ::-1] if self.is_named and count == 3 and self.name != order else image

    def wrong_channels(self, count: int, source: str) -> DataError:
        """What to say of an image with another number of channels."""
        return DataError(
            f"{source}: the number of channels is {count}, but INPUT.FORMAT {self.name!r} takes {self.channels}. "
            f"Choose other images, or a model for INPUT.FORMAT '{count}-channel'."
        )

    def _grey(self, image: np.ndarray) -> np.ndarray:
        if image.dtype == np.uint8:
            return np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert("L"))[:, :, None]
        return (image @ _LUMINANCE)[:, :, None]

    def _scale(self, pixels: np.ndarray, source: str) -> np.ndarray:
        kind = pixels.dtype.name
        if self.value_range is None and kind == "uint8":
            return pixels
        if self.value_range is None and kind not in _TYPE_RANGES:
            raise DataError(f"{source} holds {kind}: state its lowest and highest value in INPUT.VALUE_RANGE.")
        low, high = self.value_range or _TYPE_RANGES[kind]
        lowest, highest = float(pixels.min()), float(pixels.max())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise DataError(f"{source} has NaN or infinite values. Replace them by numbers.")
        if lowest < low or highest > high:
            if self.value_range is None:
                raise DataError(
                    f"{source} has values from {lowest:g} to {highest:g}, but {kind} goes from {low:g} to {high:g} "
                    "here: state its lowest and highest value in INPUT.VALUE_RANGE."
                )
            pixels = pixels.clip(low, high)
        elif self.value_range is None and kind == "uint16" and 0 < highest < high / 16:
            message = (
                f"{source}: the largest value is {highest:g} of {high:g}, so the image is dark. If all images are so, "
                "state their lowest and highest value in INPUT.VALUE_RANGE, as [0, 4095]."
            )
            log_first_n(logging.WARNING, message, name=__name__)
        # 65535 * 255 is exact in float32
        is_short = pixels.dtype.itemsize <= 2 or kind == "float32"
        values: np.ndarray = pixels.astype(np.float32 if is_short else np.float64)
        np.subtract(values, low, out=values)
        np.multiply(values, 255, out=values)
        np.divide(values, high - low, out=values)
        return whole_as_bytes(values.astype(np.float32, copy=False))


def whole_as_bytes(image: np.ndarray) -> np.ndarray:
    """An image on the scale from 0 to 255 as uint8 where it holds nothing but whole numbers, else as it is.

    So a photo gives the same result as 8-bit, as 16-bit (times 257) and as float (divided by 255).
    """
    if image.dtype == np.uint8:
        return image
    rounded = np.rint(image)
    is_whole = rounded.min() >= 0 and rounded.max() <= 255 and np.abs(image - rounded).max() < _ROUNDING
    return rounded.astype(np.uint8) if is_whole else image


def picture_of(image: np.ndarray) -> np.ndarray:
    """An image to look at, uint8 RGB [H, W, 3].

    Args:
        image: [H, W, C] from 0 to 255, colours in RGB order. Of two channels the first is shown, of more than three
            the first three.
    """
    image = image[:, :, :3] if image.shape[2] >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
    return image if image.dtype == np.uint8 else np.rint(image).astype(np.uint8)
