"""Writes predictions to pictures in a folder, a window, a video file, a JSON or a CSV file."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import sqlite3
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TextIO

import cv2
import numpy as np
from PIL import Image

from ..data.classes import ClassTable, categories
from ..data.files import IMAGE_TYPES, refuse_to_replace
from ..errors import ConfigError, DataError
from ..results.prediction import Prediction
from ..results.video import VideoDrawer
from ..results.writers import image_record
from .sources import Frame, Video

_ESCAPE = 27
# Largest value of a 16-bit PNG
_LARGEST = 2**16 - 1


class Stop(Exception):
    """The user wants no more frames."""


class Sink(ABC):
    """Takes the predictions of one frame after the other, by output; the main output comes first."""

    @abstractmethod
    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        """
        Raises:
            Stop: the user wants no more frames.
        """

    def close(self) -> None:  # noqa: B027  most sinks have nothing to close
        """Complete what was written."""


class PictureFiles(Sink):
    """Draws each image into a file of its own."""

    def __init__(self, path: str, inputs: Sequence[str]):
        """
        Args:
            path: a folder; for one input also the name of an image file.
            inputs: the image files; the pictures get their names.

        Raises:
            ConfigError: a picture would replace one of the inputs.
            OSError: nothing can be written there.
        """
        is_file = len(inputs) == 1 and path.lower().endswith(IMAGE_TYPES) and not os.path.isdir(path)
        self._paths = {inputs[0]: path} if is_file else _paths_in(path, inputs, (".jpg", ".jpeg", ".png"))
        refuse_to_replace(inputs, self._paths.values(), f"--output {path}")
        folder = os.path.dirname(os.path.abspath(path)) if is_file else path
        _try_folder(folder)

    @property
    def paths(self) -> Collection[str]:
        """The files to write."""
        return self._paths.values()

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        picture = next(iter(predictions.values())).draw(frame.picture)
        Image.fromarray(picture).save(self._paths[frame.name])


class MaskFiles(Sink):
    """Writes a PNG for each image.

    Of semantic and panoptic results its values are the classes, as of a label map: indices of the model's classes, and
    ``void`` for pixels without one. Of instances they are 16-bit numbers: 1 for the instance with the highest score,
    and so on, 0 for pixels without one.

    Attributes:
        void: the ignore value, or 65535 where that is a class.
    """

    def __init__(self, folder: str, inputs: Sequence[str], num_classes: int, ignore: int, others: Collection[str] = ()):
        """
        Args:
            folder: for the PNG files.
            inputs: the image files; the PNGs get their names.
            num_classes: number of the model's classes.
            ignore: MODEL.SEM_SEG_HEAD.IGNORE_VALUE.
            others: files that other sinks write.

        Raises:
            ConfigError: a PNG would replace one of the inputs or of the others.
            OSError: nothing can be written there.
        """
        self.void = ignore if num_classes <= ignore < _LARGEST else _LARGEST
        self._paths = _paths_in(folder, inputs)
        refuse_to_replace([*inputs, *others], self._paths.values(), f"--masks {folder}")
        _try_folder(folder)

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        output, prediction = next(iter(predictions.items()))
        if output == "instances":
            values = prediction.segment_map().astype(np.uint16)
        else:
            values = prediction.class_map(self.void).astype(np.uint8 if self.void < 256 else np.uint16)
        Image.fromarray(values).save(self._paths[frame.name])


def _try_folder(folder: str) -> None:
    """Make a folder; raises OSError where nothing can be written."""
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def _make_folder_of(path: str) -> None:
    """Make the folder of a file that will be written."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)


def _open_text(path: str) -> TextIO:
    """Open a file for text, in a folder that is made if needed; names that are not UTF-8 stay what they are."""
    _make_folder_of(path)
    return open(path, "w", newline="", encoding="utf-8", errors="surrogateescape")


def _paths_in(folder: str, inputs: Sequence[str], endings: tuple[str, ...] = (".png",)) -> dict[str, str]:
    """A file in the folder for each input, with one of the endings; inputs of one name are numbered."""
    paths: dict[str, str] = {}
    for path in inputs:
        stem, ending = os.path.splitext(os.path.basename(path))
        ending = ending if ending.lower() in endings else ".png"
        target, number = os.path.join(folder, stem + ending), 0
        while target in paths.values():
            number += 1
            target = os.path.join(folder, f"{stem}_{number}{ending}")
        paths[path] = target
    return paths


class JsonFile(Sink):
    """Writes all results into one JSON file, and panoptic PNGs to a folder beside it.

    The file is valid JSON after each image, so it can be read if the program ends early.
    """

    def __init__(self, path: str, info: Mapping[str, Any], classes: ClassTable):
        """
        Args:
            path: path of the JSON file.
            info: description of the model.
            classes: classes of the model.

        Raises:
            OSError: nothing can be written there.
        """
        self._png_folder = os.path.splitext(path)[0] + "_panoptic"
        self._count, self._ids = 0, classes.category_ids
        self._file = _open_text(path)
        head = json.dumps({"info": dict(info), "categories": categories(classes), "images": []})
        self._file.write(head)
        self._file.flush()
        self._end = len(head) - len("]}")  # json.dumps writes ASCII, so one character is one byte

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        record = image_record(frame.name, predictions, self._ids, self._save_png)
        text = (", " if self._count else "") + json.dumps(record)
        self._file.seek(self._end)
        self._file.write(text + "]}")
        self._file.flush()
        self._end += len(text)
        self._count += 1

    def _save_png(self, pixels: np.ndarray) -> str:
        os.makedirs(self._png_folder, exist_ok=True)
        name = f"{self._count:06d}.png"
        Image.fromarray(pixels).save(os.path.join(self._png_folder, name))
        return name

    def close(self) -> None:
        self._file.close()


class CsvFile(Sink):
    """Writes a row for each segment of the main output: its class, score, area and box in pixels, share of the image.

    The score is empty where segments have none, and the track where nothing is followed.
    """

    COLUMNS = ("image", "class", "score", "area", "share", "x", "y", "width", "height", "track")

    def __init__(self, path: str, classes: ClassTable):
        """
        Raises:
            OSError: nothing can be written there.
        """
        self._file = _open_text(path)
        self._rows, self._names = csv.writer(self._file), classes.names
        self._rows.writerow(self.COLUMNS)

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        prediction = next(iter(predictions.values()))
        for x in prediction.segments:
            score = "" if x.score is None else f"{x.score:.4f}"
            share = f"{x.area / math.prod(prediction.size):.6f}"
            self._rows.writerow([frame.name, self._names[x.label], score, x.area, share, *x.box, x.track_id])

    def close(self) -> None:
        self._file.close()


class JsonLines(Sink):
    """Writes a line with info and categories, then one for each image, as entries of the file.

    The PNGs of panoptic results are in the lines, as data URIs.
    """

    def __init__(self, stream: TextIO, info: Mapping[str, Any], classes: ClassTable):
        self._stream, self._ids = stream, classes.category_ids
        self._write({"info": dict(info), "categories": categories(classes)})

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        self._write(image_record(frame.name, predictions, self._ids, png_address))

    def _write(self, content: dict[str, Any]) -> None:
        try:
            print(json.dumps(content), file=self._stream, flush=True)
        except BrokenPipeError:  # the program that reads has ended, as "head" does
            raise Stop from None


def png_address(pixels: np.ndarray) -> str:
    """A picture as a PNG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


class TrackFile(Sink):
    """Writes the tracks of a video in YouTube-VIS's format of results.

    It has one entry per track: video_id, category_id, score (mean of its frames) and segmentations, one RLE per frame
    of the video, or null. A format by tracks can be written only when the video has ended; until then the masks are in
    a temporary file, so that memory does not grow with the video.
    """

    def __init__(self, path: str):
        """
        Args:
            path: the JSON file. It is opened at once, so that a wrong path is an error before the first frame.
        """
        self._file = _open_text(path)
        self._num_frames = 0
        self._masks = sqlite3.connect("")  # a temporary database on disk, which vanishes when it is closed
        self._masks.execute("CREATE TABLE masks (track INTEGER, frame INTEGER, category INTEGER, score REAL, rle TEXT)")

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        """Add the things of the next frame that have a track_id."""
        prediction = next(iter(predictions.values()))
        ids = prediction.classes.file_ids
        rows = [
            (x.track_id, self._num_frames, ids[x.label], x.score, json.dumps(x.rle()))
            for x in prediction.segments
            if x.track_id is not None and x.label < prediction.classes.num_things
        ]
        self._masks.executemany("INSERT INTO masks VALUES (?, ?, ?, ?, ?)", rows)
        self._num_frames += 1

    def close(self) -> None:
        """Write the file."""
        self._file.write("[")
        for number, track in enumerate(self._tracks()):
            self._file.write((", " if number else "") + json.dumps(track))
        self._file.write("]")
        self._file.close()
        self._masks.close()

    def _tracks(self) -> Iterator[dict[str, Any]]:
        tracks = self._masks.execute("SELECT track, category, AVG(score) FROM masks GROUP BY track, category")
        for track, category, score in tracks.fetchall():
            masks = self._masks.execute("SELECT frame, rle FROM masks WHERE track = ? ORDER BY frame", (track,))
            segmentations = [None] * self._num_frames
            for frame, rle in masks:
                segmentations[frame] = json.loads(rle)
            yield {"video_id": 1, "category_id": category, "score": score, "segmentations": segmentations}


class Window(Sink):
    """Shows pictures; Esc ends."""

    def __init__(self, milliseconds: int):
        """
        Args:
            milliseconds: for which a picture is shown; 0: until a key is pressed.
        """
        self._milliseconds = milliseconds

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        self.show(next(iter(predictions.values())).draw(frame.picture))

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


class VideoWindow(Window):
    """A :class:`Window` in which an object keeps its colour from frame to frame."""

    def __init__(self, classes: ClassTable, trail: int = 0):
        """
        Args:
            trail: see :class:`VideoDrawer`.
        """
        super().__init__(milliseconds=1)
        self._drawer = VideoDrawer(classes, trail)

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        self.show(self._drawer.draw(frame.picture, next(iter(predictions.values()))))


class VideoFile(Sink):
    """Draws into the frames of an MP4 file."""

    def __init__(self, path: str, source: Video, classes: ClassTable, trail: int = 0):
        """
        Args:
            path: the file; its size and rate are the source's.
            trail: see :class:`VideoDrawer`.

        Raises:
            ConfigError: no video can be written there, or it would replace the source.
        """
        refuse_to_replace([source.name], [path], f"--output {path}")
        self._path, self._count = path, 0
        self._drawer = VideoDrawer(classes, trail)
        height, width = source.size
        _make_folder_of(path)
        self._writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), source.rate, (width, height))
        if not self._writer.isOpened():
            raise ConfigError(
                f"--output {path}: OpenCV can't write a video there; give a folder or a file ending in .mp4."
            )

    def write(self, frame: Frame, predictions: Mapping[str, Prediction]) -> None:
        picture = self._drawer.draw(frame.picture, next(iter(predictions.values())))
        self._writer.write(picture[:, :, ::-1])
        self._count += 1

    def close(self) -> None:
        """
        Raises:
            DataError: the file is not whole. OpenCV does not say when the disk is full.
        """
        self._writer.release()
        written = max(int(cv2.VideoCapture(self._path).get(cv2.CAP_PROP_FRAME_COUNT)), 0)  # -1: not a video
        if written < self._count:
            raise DataError(f"{self._path}: {written} of {self._count} frames were written. Is the disk full?")
