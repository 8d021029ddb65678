"""Writes the tracks of a video in YouTube-VIS's format of results."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from typing import Any

from ..results.prediction import Prediction


class TrackWriter:
    """Writes one entry per track: video_id, category_id, score (mean of its frames) and segmentations.

    "segmentations" has one RLE per frame of the video, or null. A format by tracks can be written only when the video
    has ended; until then the masks are in a temporary file, so that memory does not grow with the video.
    """

    def __init__(self, path: str):
        """
        Args:
            path: the JSON file. It is opened at once, so that a wrong path is an error before the first frame.
        """
        self._file = open(path, "w")
        self._num_frames = 0
        self._masks = sqlite3.connect("")  # a temporary database on disk, which vanishes when it is closed
        self._masks.execute("CREATE TABLE masks (track INTEGER, frame INTEGER, category INTEGER, score REAL, rle TEXT)")

    def write(self, prediction: Prediction) -> None:
        """Add the things of the next frame that have a track_id."""
        ids = prediction.classes.dataset_ids or prediction.classes.category_ids
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
