"""The augmentations of training and testing, from INPUT of the config."""

from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T

from ..errors import ConfigError


def build_augmentations(cfg: CfgNode, is_train: bool) -> list:
    """Resize (INPUT.MIN_SIZE_*, MAX_SIZE_*); in training also crop, flip and colour, in this order.

    A crop is taken from the resized image, so that INPUT.CROP.SIZE is the size that the model sees.
    """
    resize, *flip = detection_utils.build_augmentation(cfg, is_train)
    if not is_train:
        return [resize]
    augmentations = [resize]
    if cfg.INPUT.CROP.ENABLED:
        augmentations.append(_crop(cfg))
    augmentations += flip
    if cfg.INPUT.COLOR_AUG_SSD:
        # Here, because the import registers a whole project's models.
        from detectron2.projects.point_rend import ColorAugSSDTransform

        augmentations.append(ColorAugSSDTransform(img_format=cfg.INPUT.FORMAT))
    return augmentations


def _crop(cfg: CfgNode) -> T.Augmentation:
    crop = cfg.INPUT.CROP
    if crop.SINGLE_CATEGORY_MAX_AREA >= 1:
        return T.RandomCrop(crop.TYPE, crop.SIZE)
    if cfg.MODEL.KNET.TASK != "semantic":
        raise ConfigError(
            f"INPUT.CROP.SINGLE_CATEGORY_MAX_AREA is {crop.SINGLE_CATEGORY_MAX_AREA}, but only MODEL.KNET.TASK "
            f"'semantic' can use it (this one is {cfg.MODEL.KNET.TASK!r}). Set it to 1.0."
        )
    return T.RandomCrop_CategoryAreaConstraint(
        crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    )
