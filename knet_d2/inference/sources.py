"""Reads the images to segment from files, folders, a video or a webcam.

A source gives frames one by one. Its attributes are unit ("image" or "frame"), count (number of frames; None: unknown)
and failed (number of frames that could not be read so far).
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from ..data.files import find_images, read_image
from ..data.pixels import PixelFormat, picture_of
from ..errors import DataError
from .batches import map_ahead

logger = logging.getLogger(__name__)

# The frame count in the header of an intact video may be too high by this number, or by this share of the frames
_FEW_FRAMES, _FEW_PART = 3, 0.05
# Milliseconds after which a stream that gives nothing has ended
_PATIENCE = 15000
# Streams without a rate state 0, or the 90,000 ticks of their clock
_LARGEST_RATE, _USUAL_RATE = 1000.0, 25.0
# The first bytes of files that name videos, which FFmpeg would open
_PLAYLISTS = (b"#EXTM3U", b"ffconcat")
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


class ImageFiles:
    """A source of image files."""

    unit = "image"

    def __init__(self, paths: Sequence[str], pixel_format: PixelFormat, workers: int = 1, are_files: bool = False):
        """
        Args:
            paths: files, folders (whose images are taken, not those of folders in them), or patterns as "a/*.jpg".
            pixel_format: what the model takes.
            workers: number of threads that read files ahead.
            are_files: each path is a file, which gives one frame, also if it can't be read.
        """
        self._pixel_format, self._workers = pixel_format.as_rgb, workers
        self.paths = list(paths) if are_files else find_images(paths)
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
    """A source of the frames of a video file, of a stream, or of the webcam.

    Attributes:
        name: the file, or the address without user and password.
        rate: frames in a second.
        size: (height, width) of a frame.
    """

    unit = "frame"

    def __init__(self, path: str | None):
        """
        Args:
            path: a file, a named pipe, or an address as rtsp://..., http://...; None: the webcam.

        Raises:
            DataError: there is no such file, or no frame can be read from it.
        """
        is_stream = path is not None and "://" in path
        if path is not None and not is_stream and (not os.path.exists(path) or os.path.isdir(path)):
            raise DataError(f"{path}: there is no such video file. Correct the path.")
        is_file = path is not None and os.path.isfile(path)
        if is_file and _is_playlist(path):
            raise DataError(f"{path}: is a playlist, which may name any file of this machine. Name a video file.")
        self.name = "webcam" if path is None else without_password(path)
        self._capture = _open_stream(path) if is_stream else cv2.VideoCapture(0 if path is None else path)
        success, self._first = self._capture.read()
        if not success:
            advice = "Check the address, user and password, and whether a player shows it." if is_stream else ""
            raise DataError(f"{'The webcam' if path is None else self.name} can't be read as a video. {advice}".strip())
        self.size = self._first.shape[:2]
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= _LARGEST_RATE else _USUAL_RATE
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if is_file and count > 0 else None
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


def _is_playlist(path: str) -> bool:
    with open(path, "rb") as f:
        return f.read(16).lstrip(b"\xef\xbb\xbf").startswith(_PLAYLISTS)


def _open_stream(address: str) -> cv2.VideoCapture:
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _PATIENCE, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _PATIENCE]
    return cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)


def without_password(address: str) -> str:
    """An address without the user and the password before its host."""
    return re.sub(r"(?<=://)[^/@]*@", "", address)
