"""The augmentations of training and testing, from INPUT of the config."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image

from ..errors import ConfigError, DataError
from ..tasks import get_task


class ResizeTransform(T.ResizeTransform):
    """Detectron2's, which averages over the pixels of an image of bytes, also for floats and any number of channels.

    Detectron2 resizes floats without averaging, and two or four channels as if the last one were alpha.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        if img.ndim == 2 or (img.dtype == np.uint8 and img.shape[2] in (1, 3)):
            return super().apply_image(img, interp)
        size, method = (self.new_w, self.new_h), self.interp if interp is None else interp
        planes = (np.ascontiguousarray(img[:, :, channel]) for channel in range(img.shape[2]))
        return np.stack([np.asarray(Image.fromarray(plane).resize(size, method)) for plane in planes], axis=2)


class Resize(T.ResizeShortestEdge):
    """Detectron2's, with a clear error for an image that is so long that nothing would be left of its short side."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform) and not (transform.new_h and transform.new_w):
            raise DataError(
                f"An image of {image.shape[1]} x {image.shape[0]} pixels (width x height) can't be resized to "
                f"{transform.new_w} x {transform.new_h}, as INPUT.MIN_SIZE_* and MAX_SIZE_* ask. Cut it into parts."
            )
        if isinstance(transform, T.ResizeTransform):
            return ResizeTransform(transform.h, transform.w, transform.new_h, transform.new_w, transform.interp)
        return transform


class QuarterTurns(T.Transform):
    """Rotates counterclockwise by multiples of 90 degrees, so that no pixel is interpolated or lost."""

    def __init__(self, height: int, width: int, turns: int):
        super().__init__()
        self.height, self.width, self.turns = height, width, turns % 4

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """[H, W] or [H, W, C] of any type."""
        return np.ascontiguousarray(np.rot90(img, self.turns))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Points [N, 2] as x and y."""
        x, y = coords[:, 0], coords[:, 1]
        turned = {0: (x, y), 1: (y, self.width - x), 2: (self.width - x, self.height - y), 3: (self.height - y, x)}
        return np.stack(turned[self.turns], axis=1)


class RandomQuarterTurns(T.Augmentation):
    """Rotates by 0, 90, 180 or 270 degrees, each with the same probability."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return QuarterTurns(image.shape[0], image.shape[1], int(self._rand_range(4)))


def build_augmentations(cfg: CfgNode, is_train: bool) -> list:
    """Resize (INPUT.MIN_SIZE_*, MAX_SIZE_*); in training also quarter turns, crop, flip and colour, in this order.

    A crop is taken from the resized image, so that INPUT.CROP.SIZE is the size that the model sees.
    """
    if not is_train:
        return [Resize(_sizes(cfg, "MIN_SIZE_TEST"), *_sizes(cfg, "MAX_SIZE_TEST"), "choice")]
    style = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    resize = Resize(_sizes(cfg, "MIN_SIZE_TRAIN"), *_sizes(cfg, "MAX_SIZE_TRAIN"), style)
    _, *flip = detection_utils.build_augmentation(cfg, is_train)
    augmentations = [resize]
    if cfg.INPUT.QUARTER_TURNS:
        augmentations.append(RandomQuarterTurns())
    if cfg.INPUT.CROP.ENABLED:
        augmentations.append(_crop(cfg))
    augmentations += flip
    if cfg.INPUT.COLOR_AUG_SSD:
        augmentations.append(_color_augmentation(cfg))
    return augmentations


def _color_augmentation(cfg: CfgNode) -> T.Transform:
    """SSD's photometric distortion, for images of bytes and of floats from 0 to 255."""
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ConfigError(
            f"INPUT.COLOR_AUG_SSD = True: set it to False. It changes colours, and INPUT.FORMAT {cfg.INPUT.FORMAT!r} "
            "has none."
        )
    # Here, because the import registers a whole project's models.
    from .color import ColorAugmentation

    return ColorAugmentation(img_format=cfg.INPUT.FORMAT)


def _sizes(cfg: CfgNode, key: str) -> list[int]:
    """One or several lengths of INPUT, checked."""
    value = cfg.INPUT[key]
    sizes = list(value) if isinstance(value, (list, tuple)) else [value]
    if not sizes or not all(type(x) is int and 0 <= x < 2**31 for x in sizes):
        raise ConfigError(f"INPUT.{key} is {str(value)[:60]}; it must be a length in pixels (or 0: as it is).")
    return sizes


def _crop(cfg: CfgNode) -> T.Augmentation:
    crop = cfg.INPUT.CROP
    if crop.SINGLE_CATEGORY_MAX_AREA >= 1:
        return T.RandomCrop(crop.TYPE, crop.SIZE)
    if "instances" in get_task(cfg).annotations:
        raise ConfigError(
            f"INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = {crop.SINGLE_CATEGORY_MAX_AREA}: set it to 1.0. MODEL.KNET.TASK "
            f"{cfg.MODEL.KNET.TASK!r} learns from instances, and this is for label maps alone."
        )
    return T.RandomCrop_CategoryAreaConstraint(
        crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    )
