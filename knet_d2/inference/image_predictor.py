"""Segments image files, folders and arrays with a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from ..data.classes import ClassTable
from ..data.pixels import picture_of
from ..errors import ConfigError, DataError
from ..results.outputs import main_prediction, predictions_of
from ..results.prediction import Prediction
from ..tasks import get_task
from ..video.model import TrackingKNet
from ..video.reading import read_ahead
from .detectron2_predictor import Predictor
from .inputs import read_input
from .sources import ImageFiles, Video
from .tiles import predict_tiles
from .trace import Trace


class ImagePredictor:
    """Segments images; :func:`knet_d2.load` makes it.

    Attributes:
        classes: the model's classes.
        model: the network, in evaluation mode.
        cfg: its config.
        pixel_format: the images that the model takes.
        outputs: the results that it can give: "instances", "panoptic_seg", "sem_seg". The first one is the main
            one, which ``predictor(image)`` returns; it is the first of MODEL.KNET.TEST.OUTPUTS.
    """

    def __init__(self, cfg: CfgNode, classes: ClassTable):
        """
        Args:
            cfg: with MODEL.WEIGHTS.
            classes: of the model; those without names get the names of the weights file.
        """
        self._predictor = Predictor(cfg)
        self.cfg = cfg
        self.model = self._predictor.network
        self.pixel_format = self._predictor.pixel_format
        self.classes = classes.named_like(self._predictor.classes)
        self.outputs = tuple(dict.fromkeys((*self.model.postprocessor.options.outputs, *get_task(cfg).outputs)))

    def __call__(
        self,
        image: Any,
        order: str | None = None,
        *,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Prediction | list[Prediction]:
        """
        Args:
            image: an image file, an http(s) address, the bytes of a file or an open file, a PIL image, an array
                [H, W, C] or [H, W], or a tensor [C, H, W]; see :func:`knet_d2.inference.inputs.read_input`. Or a list
                or tuple of these.
            order: of three channels of arrays and tensors that are colours: "RGB" (as from Pillow, imageio, matplotlib,
                torchvision) or "BGR" (as from OpenCV). It can't be told from an array, and the wrong one gives worse
                results without a sign, so it has no default.
            tile_size: side length in pixels of the tiles into which larger images are cut. Large images then need no
                more memory than small ones, and small objects keep their size.
            tile_overlap: pixels that neighbouring tiles share; None: a quarter of ``tile_size``. Objects that cross a
                border are joined there.

        Returns:
            The prediction, with the picture that it is drawn on; for a list the predictions in its order.

        Raises:
            DataError: the image can't be read, or is none.
        """
        if isinstance(image, (list, tuple)):
            return [self._with_picture(x, order, tile_size, tile_overlap) for x in image]
        return self._with_picture(image, order, tile_size, tile_overlap)

    def _with_picture(
        self, image: Any, order: str | None, tile_size: int | None, tile_overlap: int | None
    ) -> Prediction:
        pixels = self._pixels(image, order)
        rgb = pixels[:, :, ::-1] if self.pixel_format.name == "BGR" else pixels
        return self._tiled(pixels, tile_size, tile_overlap)._replace(picture=picture_of(rgb))

    def predict(self, image: np.ndarray) -> dict[str, Prediction]:
        """Predict every output of MODEL.KNET.TEST.OUTPUTS; returns the predictions by output.

        Args:
            image: [H, W, C] from 0 to 255, uint8 or float32, colours in RGB order.

        Returns:
            The main output comes first.
        """
        return predictions_of(self._predictor.predict(self._arranged(image)), self.classes)

    def trace(self, image: Any, order: str | None = None) -> Trace:
        """Run an image through the network once, to inspect the results of every stage.

        Args:
            image, order: see :meth:`__call__`.

        Raises:
            DataError: as there.
            ConfigError: the config asks for test-time augmentation, which is more than one pass.
        """
        return self._trace(self._pixels(image, order))

    def trace_image(self, image: np.ndarray) -> Trace:
        """:meth:`trace` for an image as :meth:`predict` takes it."""
        return self._trace(self._arranged(image))

    def images(self, paths: str | Sequence[str], **options: Any) -> Iterator[tuple[str, Prediction]]:
        """Predict many files one by one; files that can't be read are logged and left out.

        Args:
            paths: files, folders (whose images are taken, not those of folders in them), or patterns as "a/*.jpg".
            options: tile_size and tile_overlap, see :meth:`__call__`.

        Yields:
            path of the file, and its prediction.
        """
        for name, image in ImageFiles([paths] if isinstance(paths, str) else paths, self.pixel_format):
            if image is not None:
                yield name, self._tiled(self._arranged(image), **options)

    def video(
        self, frames: str | os.PathLike[str] | Iterable[np.ndarray], order: str | None = None
    ) -> Iterator[Prediction]:
        """The predictions of a video's frames, one by one; segments of one object have the same track_id.

        Memory does not grow with the video. Frames are read while others are computed.

        Args:
            frames: a video file, or arrays as :meth:`__call__` takes them.
            order: of the channels of arrays, see there.

        Raises:
            DataError: the file can't be read as a video, or an array is no image.
            ConfigError: the config asks for test-time augmentation.
        """
        follow = self._follower()
        if isinstance(frames, (str, os.PathLike)):
            if order is not None:
                raise DataError(f"{frames}: order = {order!r} is for arrays; that of a file is known. Leave it out.")
            images = (self._arranged(frame.picture) for frame in Video(os.fspath(frames)))
        else:
            images = (self._pixels(frame, order) for frame in frames)
        for image in read_ahead(images):
            yield next(iter(follow(image).values()))

    def follower(self) -> Callable[[np.ndarray], dict[str, Prediction]]:
        """A function like :meth:`predict` for the frames of one video in their order; it gives segments track ids.

        Raises:
            ConfigError: the config asks for test-time augmentation.
        """
        follow = self._follower()
        return lambda image: follow(self._arranged(image))

    def _follower(self) -> Callable[[np.ndarray], dict[str, Prediction]]:
        """The same for images of pixel_format."""
        model = TrackingKNet(self.cfg, self.model)

        @torch.no_grad()
        def follow(image: np.ndarray) -> dict[str, Prediction]:
            sample = {**self._predictor.sample(image), "video_id": 0}
            return predictions_of(model([sample])[0], self.classes)

        return follow

    def _tiled(self, pixels: np.ndarray, tile_size: int | None = None, tile_overlap: int | None = None) -> Prediction:
        if tile_size is None:
            return self._main_prediction(pixels)
        overlap = tile_size // 4 if tile_overlap is None else tile_overlap
        return predict_tiles(self._main_prediction, pixels, tile_size, overlap)

    def _main_prediction(self, pixels: np.ndarray) -> Prediction:
        return main_prediction(self._predictor.predict(pixels), self.classes)

    def _trace(self, pixels: np.ndarray) -> Trace:
        if self.cfg.TEST.AUG.ENABLED:
            raise ConfigError("TEST.AUG.ENABLED = True: there is no trace of several views; set it to False.")
        return Trace(self.model, self._predictor.sample(pixels), self.classes, self.outputs)

    def _arranged(self, image: np.ndarray) -> np.ndarray:
        return self.pixel_format.arrange(image, "The image")

    def _pixels(self, image: Any, order: str | None) -> np.ndarray:
        """Convert an image of any kind to the model's format of images."""
        return read_input(image, order, self.pixel_format)
