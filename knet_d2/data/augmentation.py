"""The augmentations of training and testing, from INPUT of the config."""

import inspect
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from PIL import Image

from ..errors import ConfigError, DataError
from ..tasks import get_task
from .pixels import PixelFormat

# The entry of INPUT.AUGMENTATIONS that stands for the other options of INPUT
DEFAULT = "Default"
# Height and width of the image on which the entries of INPUT.AUGMENTATIONS are tried
_TRIAL_SIZE = (48, 64)


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


class FixedResize(T.Resize):
    """Detectron2's, with :class:`ResizeTransform`."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        return ResizeTransform(transform.h, transform.w, transform.new_h, transform.new_w, transform.interp)


class ResizeScale(T.ResizeScale):
    """Detectron2's, with :class:`ResizeTransform`; at least one pixel is left of each side."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        size = max(1, int(transform.new_h)), max(1, int(transform.new_w))
        return ResizeTransform(transform.h, transform.w, *size, transform.interp)


class FixedSizeCrop(T.FixedSizeCrop):
    """Detectron2's without its padding, whose labels depend on Detectron2's version.

    What is smaller is padded in the batch as all images are, see :func:`padded_size`: labels are ignored there, masks
    are 0, and no point of a loss is sampled.
    """

    def __init__(self, crop_size: tuple[int, int]):
        super().__init__(tuple(crop_size), pad=False)


# What INPUT.AUGMENTATIONS may name, by Detectron2's names. RandomExtent is left out: it interpolates labels.
AUGMENTATIONS: dict[str, type[T.Augmentation]] = {
    "FixedSizeCrop": FixedSizeCrop,
    "RandomBrightness": T.RandomBrightness,
    "RandomContrast": T.RandomContrast,
    "RandomCrop": T.RandomCrop,
    "RandomFlip": T.RandomFlip,
    "RandomLighting": T.RandomLighting,
    "RandomQuarterTurns": RandomQuarterTurns,
    "RandomRotation": T.RandomRotation,
    "RandomSaturation": T.RandomSaturation,
    "Resize": FixedResize,
    "ResizeScale": ResizeScale,
    "ResizeShortestEdge": Resize,
}
# These reckon with the order of the channels
_NEED_RGB = ("RandomLighting", "RandomSaturation")


def build_augmentations(cfg: CfgNode, is_train: bool) -> list:
    """Return the augmentations of training, INPUT.AUGMENTATIONS, or the resizing of testing (INPUT.MIN_SIZE_TEST).

    Raises:
        ConfigError: an option of INPUT has a value that makes no sense; names the key.
    """
    if not is_train:
        return [Resize(_sizes(cfg, "MIN_SIZE_TEST"), *_sizes(cfg, "MAX_SIZE_TEST"), "choice")]
    augmentations = []
    for i, entry in enumerate(cfg.INPUT.AUGMENTATIONS):
        if entry == {"name": DEFAULT}:
            augmentations += _default_augmentations(cfg)
        else:
            augmentations.append(_from_entry(entry, f"INPUT.AUGMENTATIONS[{i}]", PixelFormat.from_config(cfg)))
    return augmentations


def has_default_augmentations(cfg: CfgNode) -> bool:
    """Whether INPUT.CROP and the other options of INPUT for training are in force."""
    return {"name": DEFAULT} in list(cfg.INPUT.AUGMENTATIONS)


def padded_size(augmentations: list) -> tuple[int, int] | None:
    """The least (height, width) to which training batches are padded: that of the last FixedSizeCrop, if there is one.

    All batches then have one size.
    """
    sizes = [x.crop_size for x in augmentations if isinstance(x, FixedSizeCrop)]
    return sizes[-1] if sizes else None


def _from_entry(entry: Any, key: str, pixel_format: PixelFormat) -> T.Augmentation:
    """An augmentation from its name and arguments, {"name": ..., **arguments}, which is tried on a small image.

    "prob" of an augmentation that has no such argument is the probability with which it is applied at all.
    """
    names = ", ".join([DEFAULT, *AUGMENTATIONS])
    name = entry.get("name") if isinstance(entry, dict) else None
    if name not in AUGMENTATIONS:
        raise ConfigError(f"{key} = {entry}: use {{name: NAME, ARGUMENT: VALUE, ...}}, where NAME is one of {names}.")
    if name in _NEED_RGB and pixel_format.name != "RGB":
        raise ConfigError(f"{key} = {entry}: leave it out. It needs INPUT.FORMAT 'RGB', not {pixel_format.name!r}.")
    kind, arguments = AUGMENTATIONS[name], {k: x for k, x in entry.items() if k != "name"}
    signature = inspect.signature(kind)
    probability = None if "prob" in signature.parameters else arguments.pop("prob", None)
    try:
        if not 0 <= entry.get("prob", 0) <= 1:
            raise ValueError("prob is a probability from 0 to 1")
        augmentation = kind(**arguments)
        _try(augmentation, pixel_format.channels)
        return augmentation if probability is None else T.RandomApply(augmentation, probability)
    except Exception as error:
        raise ConfigError(
            f"{key} = {entry}: correct the arguments, {name}{signature}. It fails: {type(error).__name__}: {error}"
        ) from error


def _try(augmentation: T.Augmentation, channels: int) -> None:
    """Augment a grey image, with generators of its own for what is drawn; wrong arguments raise any exception."""
    image = np.full((*_TRIAL_SIZE, channels), 100, np.uint8)
    state = np.random.get_state()
    try:
        transform = augmentation(aug_input := T.AugInput(image, sem_seg=image[:, :, 0]))
    finally:
        np.random.set_state(state)
    transform.apply_coords(np.zeros((4, 2)))
    if not aug_input.image.size:
        raise ValueError("nothing is left of an image")


def _default_augmentations(cfg: CfgNode) -> list:
    """Resize (INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN), crop, flip and colour, in this order.

    A crop is taken from the resized image, so that INPUT.CROP.SIZE is the size that the model sees.
    """
    style = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    sizes = _sizes(cfg, "MIN_SIZE_TRAIN")
    if style == "range" and len(sizes) == 1:  # Detectron2 refuses a range of one size
        sizes = sizes * 2
    resize = Resize(sizes, *_sizes(cfg, "MAX_SIZE_TRAIN"), style)
    augmentations = [resize]
    if cfg.INPUT.CROP.ENABLED:
        augmentations.append(_crop(cfg))
    flip = cfg.INPUT.RANDOM_FLIP
    if flip != "none":
        augmentations.append(T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"))
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
    value = getattr(cfg.INPUT, key)
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
