"""Reads the images to segment from files, folders, a video or a webcam."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from ..data.files import find_images, read_image
from ..data.pixels import PixelFormat, picture_of
from ..errors import DataError
from .batches import map_ahead

logger = logging.getLogger(__name__)

# The frame count in the header of an intact video may be too high by this number, or by this share of the frames
_FEW_FRAMES, _FEW_PART = 3, 0.05
# Largest ratio of two steps of time in a video of constant rate, whose times are rounded
_EQUAL_STEPS = 1.5


class Frame(NamedTuple):
    """An image and its name.

    Attributes:
        name: its file, or its video with the number of the frame behind "#".
        image: [H, W, C] from 0 to 255, uint8 or float32, colours in RGB order; None if it can't be read; the reason is
            then logged.
        error: that reason.
    """

    name: str
    image: np.ndarray | None
    error: str = ""

    @property
    def picture(self) -> np.ndarray:
        """The image as uint8 RGB [H, W, 3] for display; see picture_of."""
        return picture_of(self.image)


class Source(Protocol):
    """Gives frames one by one.

    Attributes:
        unit: name of one frame, "image" or "frame".
        count: number of frames; None: unknown.
        failed: number of frames that could not be read so far.
    """

    unit: str
    count: int | None
    failed: int

    def __iter__(self) -> Iterator[Frame]: ...


class ImageFiles:
    """A :class:`Source` of image files."""

    unit = "image"

    def __init__(self, paths: Sequence[str], pixel_format: PixelFormat, workers: int = 1):
        """
        Args:
            paths: files, folders (whose images are taken, not those of folders in them), or patterns as "a/*.jpg".
            pixel_format: what the model takes.
            workers: number of threads that read files ahead.
        """
        self._pixel_format, self._workers = pixel_format.as_rgb, workers
        self.paths = find_images(paths)
        self.count = len(self.paths)
        self.failed = 0

    def __iter__(self) -> Iterator[Frame]:
        for frame in map_ahead(self._read, self.paths, self._workers):
            self.failed += frame.image is None
            yield frame

    def _read(self, path: str) -> Frame:
        try:
            return Frame(path, read_image(path, self._pixel_format))
        except DataError as error:
            logger.error(f"Skipped: {error}")
            return Frame(path, None, str(error))


class Video:
    """A :class:`Source` of the frames of a video file, or of the webcam.

    Attributes:
        name: the file.
        rate: frames in a second.
        size: (height, width) of a frame.
    """

    unit = "frame"

    def __init__(self, path: str | None):
        """
        Args:
            path: None: the webcam.

        Raises:
            DataError: there is no such file, or no frame can be read from it.
        """
        if path is not None and not os.path.isfile(path):
            raise DataError(f"{path}: there is no such video file. Correct the path.")
        self.name = path or "webcam"
        self._capture = cv2.VideoCapture(0 if path is None else path)
        success, self._first = self._capture.read()
        if not success:
            raise DataError(f"{path or 'The webcam'} can't be read as a video.")
        self.size = self._first.shape[:2]
        self.rate = self._capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.count = None if path is None else int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.failed = 0

    def __iter__(self) -> Iterator[Frame]:
        frame, number, success = self._first, 0, True
        before, steps = self._milliseconds(), (math.inf, 0.0)
        try:
            while success:
                yield Frame(f"{self.name}#{number}", np.ascontiguousarray(frame[:, :, ::-1]))
                number += 1
                success, frame = self._capture.read()
                if success:
                    now = self._milliseconds()
                    before, steps = now, (min(steps[0], now - before), max(steps[1], now - before))
        finally:
            self._capture.release()
        if steps[1] > _EQUAL_STEPS * steps[0] and steps[0] > 0:
            logger.warning(
                f"{self.name}: the frame rate varies, with {steps[0]:.0f} to {steps[1]:.0f} ms between frames. All "
                f"frames are used; a video that is drawn has {self.rate:.3g} frames a second."
            )
        missing = (self.count or 0) - number
        if missing > max(_FEW_FRAMES, _FEW_PART * number):
            self.failed = missing
            logger.error(f"{self.name}: {number} of {self.count} frames could be read. Is the file cut off?")

    def _milliseconds(self) -> float:
        """The time of the last frame; 0 where it is not known."""
        return self._capture.get(cv2.CAP_PROP_POS_MSEC)
