"""Where predictions go: pictures in a folder, a window, a video file, a JSON file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

import cv2
import numpy as np
from PIL import Image

from ..data.classes import ClassTable
from ..errors import ConfigError
from ..results.prediction import Prediction
from ..results.video import VideoDrawer
from ..results.writers import JsonWriter
from .sources import Frame

_ESCAPE = 27


class Stop(Exception):
    """The user wants no more frames."""


class Sink(Protocol):
    """Takes the predictions of one frame after the other, by the keys of the model's outputs, the main one first.

    Raises:
        Stop: no more are wanted.
    """

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None: ...

    def close(self) -> None: ...


class PictureFiles:
    """A :class:`Sink` that draws each image into a file: ``path`` itself if that names one, else a new file in it."""

    def __init__(self, path: str, *, is_file: bool):
        self._path, self._is_file = path, is_file
        self._written: set[str] = set()

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        path = self._path if self._is_file else self._new_path(frame.name)
        picture = next(iter(predictions.values())).draw(frame.image)
        Image.fromarray(picture).save(path)

    def _new_path(self, name: str) -> str:
        os.makedirs(self._path, exist_ok=True)
        stem, ending = os.path.splitext(os.path.basename(name))
        ending = ending if ending.lower() in (".jpg", ".jpeg", ".png") else ".png"
        path, number = os.path.join(self._path, stem + ending), 0
        while path in self._written:  # images of one name from several folders
            number += 1
            path = os.path.join(self._path, f"{stem}_{number}{ending}")
        self._written.add(path)
        return path

    def close(self) -> None:
        pass


class JsonFile:
    """A :class:`Sink` that writes all results into one file, see :class:`JsonWriter`."""

    def __init__(self, writer: JsonWriter):
        self._writer = writer

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        self._writer.write(frame.name, predictions)

    def close(self) -> None:
        self._writer.close()


class Window:
    """A :class:`Sink` that shows pictures; Esc ends."""

    def __init__(self, milliseconds: int):
        """
        Args:
            milliseconds: for which a picture is shown; 0: until a key is pressed.
        """
        self._milliseconds = milliseconds

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        self.show(next(iter(predictions.values())).draw(frame.image))

    def show(self, picture: np.ndarray) -> None:
        """Show an RGB picture."""
        try:
            cv2.imshow("K-Net", picture[:, :, ::-1])
            key = cv2.waitKey(self._milliseconds)
        except cv2.error as error:
            message = "No window can be opened (no display, or OpenCV's headless build): use --output."
            raise ConfigError(message) from error
        if key == _ESCAPE:
            raise Stop

    def close(self) -> None:
        pass


class VideoWindow(Window):
    """A :class:`Window` in which an object keeps its colour from frame to frame."""

    def __init__(self, classes: ClassTable):
        super().__init__(milliseconds=1)
        self._drawer = VideoDrawer(classes)

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        self.show(self._drawer.draw(frame.image, *next(iter(predictions.items()))))


class VideoFile:
    """A :class:`Sink` that draws into the frames of an MP4 file."""

    def __init__(self, path: str, rate: float, classes: ClassTable):
        """
        Args:
            rate: frames in a second.
        """
        self._path, self._rate = path, rate
        self._drawer = VideoDrawer(classes)
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        picture = self._drawer.draw(frame.image, *next(iter(predictions.items())))
        if self._writer is None:
            self._writer = self._open(picture.shape[1], picture.shape[0])
        self._writer.write(picture[:, :, ::-1])

    def _open(self, width: int, height: int) -> cv2.VideoWriter:
        writer = cv2.VideoWriter(self._path, cv2.VideoWriter.fourcc(*"mp4v"), self._rate, (width, height))
        if not writer.isOpened():
            raise ConfigError(
                f"--output {self._path}: OpenCV can't write a video there; give a folder or a file ending in .mp4."
            )
        return writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
