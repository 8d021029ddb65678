"""A model that predicts large images tile by tile, for evaluation (TEST.TILES)."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from torch import nn

from ..data.augmentation import Resize
from ..data.classes import class_table
from ..data.pixels import whole_as_bytes
from ..errors import ConfigError
from ..results.outputs import predictions_of, result_of
from ..results.prediction import Prediction
from .detectron2_predictor import resized_sample
from .tiles import predict_outputs


def size_and_overlap(cfg: CfgNode) -> tuple[int, int]:
    """Side of a tile, and the pixels that neighbours share, from TEST.TILES.

    Raises:
        ConfigError: they make no sense.
    """
    tiles = cfg.TEST.TILES
    if tiles.SIZE < 4:
        raise ConfigError(f"TEST.TILES.SIZE = {tiles.SIZE}: use 0 (whole images), or at least 4 pixels.")
    overlap = tiles.OVERLAP or tiles.SIZE // 4
    if not 0 < overlap < tiles.SIZE:
        raise ConfigError(f"TEST.TILES.OVERLAP = {tiles.OVERLAP}: use 1 to {tiles.SIZE - 1} (TEST.TILES.SIZE).")
    return tiles.SIZE, overlap


class TiledKNet(nn.Module):
    """A model that cuts images into tiles; it is called as the model is, with images in their original size.

    Each tile is resized as an image is (INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST). The results are those of
    :func:`.outputs.result_of`.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        """
        Args:
            cfg: with its classes resolved.
            model: a KNet, or what is called like one.

        Raises:
            ConfigError: TEST.TILES makes no sense.
        """
        super().__init__()
        self.model = model
        self._size, self._overlap = size_and_overlap(cfg)
        self._resize = Resize([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        self._classes = class_table(cfg)
        self.train(model.training)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Args:
            batched_inputs: as for the model; the image in its original size.
        """
        images = (whole_as_bytes(x["image"].permute(1, 2, 0).cpu().numpy()) for x in batched_inputs)
        found = (predict_outputs(self._predict, image, self._size, self._overlap) for image in images)
        return [{output: result_of(output, x) for output, x in predictions.items()} for predictions in found]

    def _predict(self, tile: np.ndarray) -> dict[str, Prediction]:
        (results,) = self.model([resized_sample(tile, self._resize)])
        return predictions_of(results, self._classes)
