"""Detectron2's DefaultPredictor for a K-Net: it is made from a config, and returns Detectron2's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from ..checkpoint import Checkpointer, describe_model
from ..data.augmentation import Resize
from ..data.classes import class_table, with_classes
from ..data.pixels import PixelFormat
from ..errors import ConfigError
from ..modeling.tta import KNetWithTTA
from ..tasks import get_task
from .batches import in_groups


class Predictor(DefaultPredictor):
    """Detectron2's DefaultPredictor, with weights read by K-Net's checkpointer.

    Call it with an image as files have it, uint8, uint16 or floats [H, W, C] (see PixelFormat); three channels that are
    colours in BGR order, whatever INPUT.FORMAT is. It returns the model's results.

    Attributes:
        name: of the engine.
        pixel_format: the model's format of images.
        classes: the model's classes; their names are the data set's, else those of the weights file.
        outputs: the results that the model can give, the main one first.
        network: the model without test-time augmentation; ``model`` includes it if TEST.AUG.ENABLED is True.
    """

    name = "pytorch"

    def __init__(self, cfg: CfgNode, content: Any = None):
        """
        Args:
            cfg: with MODEL.WEIGHTS.
            content: of that file, as :func:`load_file` returns it; None: it is read.
        """
        self.cfg = cfg = with_classes(cfg).clone()
        self.pixel_format = PixelFormat.from_config(cfg)
        self.network = self.model = build_model(cfg).eval()
        checkpointer = Checkpointer(self.network, metadata=describe_model(cfg), classes=class_table(cfg))
        if content is None:
            checkpointer.load(cfg.MODEL.WEIGHTS)
        else:
            checkpointer.load_content(content, cfg.MODEL.WEIGHTS)
        self.classes = class_table(cfg).named_like(checkpointer.file_classes)
        shorter = cfg.INPUT.MIN_SIZE_TEST
        if cfg.TEST.AUG.ENABLED:
            self.model, shorter = KNetWithTTA(cfg, self.network).eval(), 0  # it resizes images itself
        self.aug = Resize([shorter, shorter], cfg.INPUT.MAX_SIZE_TEST)
        # As in Detectron2's, for code that draws the results
        self.metadata, self.input_format = MetadataCatalog.get(next(iter(cfg.DATASETS.TEST), "__unused")), "BGR"
        self.outputs = tuple(dict.fromkeys((*self.network.postprocessor.options.outputs, *get_task(cfg).outputs)))

    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """The model's results for one image, BGR."""
        return self.predict([self.sample(self.pixel_format.prepare(original_image, "The image", "BGR"))])[0]

    @torch.no_grad()
    def predict(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The model's results for inputs of :meth:`sample`.

        Only images that are padded to one size also alone are computed together, so that no result depends on the
        sizes of the other images.
        """
        return in_groups(self.model, samples, self._padded_size)

    def sample(self, image: np.ndarray, pad_to: tuple[int, int] | None = None) -> dict[str, Any]:
        """The model's input for one image of pixel_format; results have the size of that image.

        Args:
            pad_to: height and width that the resized image is padded to; they are rounded up to multiples of the
                model's ``size_divisibility``. None: the next multiples.

        Raises:
            ConfigError: the model takes no padding, or the resized image is larger.
        """
        sample = resized_sample(image, self.aug)
        if pad_to is None:
            return sample
        if self.cfg.TEST.AUG.ENABLED:
            raise ConfigError(f"pad_to = {pad_to}: TEST.AUG has images of several sizes. Leave one of them out.")
        check_padding(pad_to, sample["image"].shape[1:], self.network.preprocessor.pads_images)
        return {**sample, "padded_size": tuple(pad_to)}

    def _padded_size(self, sample: dict[str, Any]) -> tuple[int, ...]:
        step, least = max(self.network.size_divisibility, 1), sample.get("padded_size", (0, 0))
        return tuple(-(-max(sides) // step) * step for sides in zip(sample["image"].shape[1:], least))


def resized_sample(image: np.ndarray, resize: Resize) -> dict[str, Any]:
    """A model's input for an image [H, W, C]: "image", resized, [C, h, w]; "height" and "width", those of the image."""
    height, width = image.shape[:2]
    image = resize.get_transform(image).apply_image(image)
    return {"image": torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C")), "height": height, "width": width}


def check_padding(pad_to: tuple[int, int], size: Sequence[int], takes_padding: bool) -> None:
    """Check the size that an image is to be padded to.

    Args:
        pad_to, size: (height, width), and that of the resized image.
        takes_padding: whether the model does.

    Raises:
        ConfigError: it does not, or the image is larger.
    """
    if not takes_padding:
        raise ConfigError(f"pad_to = {pad_to}: a semantic model sees no padding. Leave it out.")
    if len(pad_to) != 2 or any(length > most for length, most in zip(size, pad_to)):
        raise ConfigError(
            f"pad_to = {pad_to}: an image is resized to {size[0]} x {size[1]} pixels (height x width). Give a height "
            "and a width that no image exceeds."
        )
