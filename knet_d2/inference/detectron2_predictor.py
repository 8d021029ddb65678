"""Detectron2's DefaultPredictor for a K-Net: it is made from a config, and returns Detectron2's results."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from ..checkpoint import Checkpointer
from ..data.augmentation import Resize
from ..data.classes import class_table, with_classes
from ..data.pixels import PixelFormat
from ..modeling.tta import KNetWithTTA


class Predictor(DefaultPredictor):
    """Detectron2's DefaultPredictor, with weights read by K-Net's checkpointer.

    Call it with an image as files have it, uint8, uint16 or floats [H, W, C] (see PixelFormat); three channels that are
    colours in BGR order, whatever INPUT.FORMAT is. It returns the model's results.

    Attributes:
        pixel_format: the model's format of images.
        classes: the model's classes; their names are the data set's, else those of the weights file.
        network: the model without test-time augmentation; ``model`` includes it if TEST.AUG.ENABLED is True.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg = with_classes(cfg).clone()
        self.pixel_format = PixelFormat.from_config(cfg)
        self.network = self.model = build_model(cfg).eval()
        checkpointer = Checkpointer(self.network, classes=class_table(cfg))
        checkpointer.load(cfg.MODEL.WEIGHTS)
        self.classes = class_table(cfg).named_like(checkpointer.file_classes)
        shorter = cfg.INPUT.MIN_SIZE_TEST
        if cfg.TEST.AUG.ENABLED:
            self.model, shorter = KNetWithTTA(cfg, self.network).eval(), 0  # it resizes images itself
        self.aug = Resize([shorter, shorter], cfg.INPUT.MAX_SIZE_TEST)

    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """The model's results for one image, BGR."""
        return self.predict(self.pixel_format.prepare(original_image, "The image", "BGR"))

    @torch.no_grad()
    def predict(self, image: np.ndarray) -> dict[str, Any]:
        """The model's results for one image of pixel_format."""
        return self.model([self.sample(image)])[0]

    def sample(self, image: np.ndarray) -> dict[str, Any]:
        """The model's input for one image of pixel_format; results have the size of that image."""
        height, width = image.shape[:2]
        image = self.aug.get_transform(image).apply_image(image)
        tensor = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
        return {"image": tensor, "height": height, "width": width}
