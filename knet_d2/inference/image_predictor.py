"""Segments image files, folders and arrays with a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from detectron2.config import CfgNode

from ..data.classes import ClassTable
from ..data.pixels import PixelFormat, picture_of
from ..errors import ConfigError, DataError
from ..modeling.meta_arch import KNet
from ..results.outputs import main_prediction, predictions_of
from ..results.prediction import Prediction
from ..video.model import TrackingKNet
from .batches import batched, map_ahead, read_ahead
from .detectron2_predictor import Predictor
from .inputs import read_input
from .sources import Frame, ImageFiles, Video
from .tiles import predict_tiles
from .trace import Trace

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Computes the results of images: :class:`Predictor` by PyTorch, :class:`.OnnxPredictor` by the other engines.

    Attributes:
        name: as :func:`knet_d2.load` takes it.
        network: PyTorch's model, or None.
        outputs: the results that it can give, the main one first.
    """

    name: str
    pixel_format: PixelFormat
    classes: ClassTable
    network: KNet | None
    outputs: tuple[str, ...]

    def sample(self, image: np.ndarray, pad_to: tuple[int, int] | None = None) -> dict[str, Any]: ...

    def predict(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]: ...


class ImagePredictor:
    """Segments images; :func:`knet_d2.load` makes it.

    Attributes:
        classes: the model's classes.
        cfg: the model's config.
        pixel_format: the images that the model takes.
        outputs: the results that it can give: "instances", "panoptic_seg", "sem_seg". The first one is the main
            one, which ``predictor(image)`` returns; it is the first of MODEL.KNET.TEST.OUTPUTS.
    """

    def __init__(self, cfg: CfgNode, classes: ClassTable, engine: Engine | None = None):
        """
        Args:
            cfg: with MODEL.WEIGHTS.
            classes: of the model; those without names get the names of the weights file.
            engine: computes the results; None: PyTorch.
        """
        self._engine: Engine = Predictor(cfg) if engine is None else engine
        self.cfg = cfg
        self.pixel_format = self._engine.pixel_format
        self.classes = classes.named_like(self._engine.classes)
        self.outputs = self._engine.outputs
        if tile_size := cfg.TEST.TILES.SIZE:
            logger.warning(
                "TEST.TILES.SIZE = %d is for evaluation. Predictions are of whole images, unless you give "
                "tile_size=%d.",
                tile_size,
                tile_size,
            )

    @property
    def model(self) -> KNet:
        """The network, in evaluation mode.

        Raises:
            ConfigError: the engine is not PyTorch.
        """
        if self._engine.network is None:
            raise ConfigError(
                f"engine = {self._engine.name!r}: traces, videos and whatever else needs PyTorch's model can't be "
                "done with an exported one. Load the weights file with engine='pytorch'."
            )
        return self._engine.network

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
        found = self._main_prediction(pixels) if tile_size is None else self._tiled(pixels, tile_size, tile_overlap)
        return found._replace(picture=self._picture(pixels))

    def _picture(self, pixels: np.ndarray) -> np.ndarray:
        return picture_of(pixels[:, :, ::-1] if self.pixel_format.name == "BGR" else pixels)

    def predict(self, image: np.ndarray) -> dict[str, Prediction]:
        """Predict every output of MODEL.KNET.TEST.OUTPUTS; returns the predictions by output.

        Args:
            image: [H, W, C] from 0 to 255, uint8 or float32, colours in RGB order.

        Returns:
            The main output comes first.
        """
        return predictions_of(self._results(self._arranged(image)), self.classes)

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

    def predict_batch(
        self,
        images: Sequence[Any],
        order: str | None = None,
        *,
        pad_to: tuple[int, int] | None = None,
    ) -> list[Prediction]:
        """The predictions of several images, in order; those of :meth:`__call__`, except for rounding.

        Only images that are resized and padded to one size are computed together, as padding changes results. Sort
        images by their size to have full batches, or give ``pad_to``.

        Args:
            images, order: see :meth:`__call__`.
            pad_to: height and width that all resized images are padded to, so that they are computed together. The
                results are then those of single images with the same ``pad_to``.

        Raises:
            DataError: an image can't be read, or is none.
            ConfigError: pad_to is given for a semantic model, or an image is larger after resizing.
        """
        pixels = [self._pixels(image, order) for image in images]
        results = self._engine.predict([self._engine.sample(x, pad_to) for x in pixels])
        found = zip(results, pixels, strict=True)
        return [main_prediction(x, self.classes)._replace(picture=self._picture(image)) for x, image in found]

    def images(
        self,
        paths: str | Sequence[str],
        *,
        batch_size: int = 1,
        workers: int = 1,
        pad_to: tuple[int, int] | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Iterator[tuple[str, Prediction]]:
        """Predict many files; those that can't be read are logged and left out.

        Files are read while others are predicted, and predicted while the caller handles earlier predictions. Memory
        does not grow with their number.

        Args:
            paths: files, folders (whose images are taken, not those of folders in them), or patterns as "a/*.jpg".
            batch_size: number of images that are predicted at once.
            workers: number of threads that read and resize.
            pad_to: see :meth:`predict_batch`.
            tile_size, tile_overlap: see :meth:`__call__`; only for single images.

        Yields:
            path of the file, and its prediction.

        Raises:
            ConfigError: see :meth:`predict_batch`; or an option makes no sense.
        """
        source = ImageFiles([paths] if isinstance(paths, str) else paths, self.pixel_format, workers)
        if tile_size is None:
            for frame, predictions in self.predict_frames(source, batch_size, workers, pad_to=pad_to):
                yield frame.name, next(iter(predictions.values()))
            return
        if batch_size != 1 or pad_to is not None:
            raise ConfigError(f"tile_size = {tile_size}: tiles are predicted one by one, without batch_size or pad_to.")
        readable = ((frame.name, self._arranged(frame.image)) for frame in source if frame.image is not None)
        yield from read_ahead((name, self._tiled(image, tile_size, tile_overlap)) for name, image in readable)

    def predict_frames(
        self, frames: Iterable[Frame], batch_size: int = 1, workers: int = 1, *, pad_to: tuple[int, int] | None = None
    ) -> Iterator[tuple[Frame, dict[str, Prediction]]]:
        """The frames of a source and what :meth:`predict` gives for each, in order, without those that can't be read.

        Args:
            frames, batch_size, workers, pad_to: see :meth:`images`.

        Raises:
            ConfigError: see there.
        """
        for name, value in (("batch_size", batch_size), ("workers", workers)):
            if value < 1:
                raise ConfigError(f"{name} = {value}: use at least 1.")
        return read_ahead(self._predicted(frames, batch_size, workers, pad_to), count=batch_size + 1)

    def _predicted(
        self, frames: Iterable[Frame], batch_size: int, workers: int, pad_to: tuple[int, int] | None
    ) -> Iterator[tuple[Frame, dict[str, Prediction]]]:
        def prepared(frame: Frame) -> tuple[Frame, dict[str, Any]]:
            return frame, self._engine.sample(self._arranged(frame.image), pad_to)

        readable = (frame for frame in frames if frame.image is not None)
        for batch in batched(map_ahead(prepared, readable, workers), batch_size):
            results = self._engine.predict([sample for _, sample in batch])
            for (frame, _), result in zip(batch, results, strict=True):
                yield frame, predictions_of(result, self.classes)

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
            sample = {**self._engine.sample(image), "video_id": 0}
            return predictions_of(model([sample])[0], self.classes)

        return follow

    def _tiled(self, pixels: np.ndarray, tile_size: int, tile_overlap: int | None) -> Prediction:
        overlap = tile_size // 4 if tile_overlap is None else tile_overlap
        return predict_tiles(self._main_prediction, pixels, tile_size, overlap)

    def _main_prediction(self, pixels: np.ndarray) -> Prediction:
        return main_prediction(self._results(pixels), self.classes)

    def _results(self, pixels: np.ndarray) -> dict[str, Any]:
        return self._engine.predict([self._engine.sample(pixels)])[0]

    def _trace(self, pixels: np.ndarray) -> Trace:
        if self.cfg.TEST.AUG.ENABLED:
            raise ConfigError("TEST.AUG.ENABLED = True: there is no trace of several views; set it to False.")
        return Trace(self.model, self._engine.sample(pixels), self.classes, self.outputs)

    def _arranged(self, image: np.ndarray) -> np.ndarray:
        return self.pixel_format.arrange(image, "The image")

    def _pixels(self, image: Any, order: str | None) -> np.ndarray:
        """Convert an image of any kind to the model's format of images."""
        return read_input(image, order, self.pixel_format)
