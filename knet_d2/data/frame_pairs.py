"""Selects the reference frame of each training frame of a video (Video K-Net, Sec. 3.3)."""

import os
from itertools import groupby

import numpy as np

from ..errors import ConfigError


class FramePairs:
    """Draws reference frames: of the same video, at most some frames before or after, never the frame itself.

    A frame that is alone in its video is its own reference frame.
    """

    def __init__(self, records: list[dict], reach: int):
        """
        Args:
            records: with "video_id"; those of one video follow each other in the order of time.
            reach: largest distance in records.

        Raises:
            ConfigError: a record is of no video.
        """
        other = next((x for x in records if "video_id" not in x), None)
        if other is not None:
            raise ConfigError(
                f"DATASETS.TRAIN: {other['file_name']} is of no video, and the model learns to follow objects. Name "
                "data sets of videos only, or set EMBEDDING, LINKING and FUSING of MODEL.KNET.VIDEO to False."
            )
        self._reach = reach
        # With the folder, as two data sets may number their videos alike
        videos = groupby(records, key=lambda x: (x["video_id"], os.path.dirname(x["file_name"])))
        lengths = np.array([len(list(frames)) for _, frames in videos])
        ends = lengths.cumsum()
        self._first, self._last = np.repeat(ends - lengths, lengths), np.repeat(ends - 1, lengths)

    def draw(self, index: int) -> int:
        """The reference frame of a frame, both as indices of records; by NumPy's generator."""
        first, last = max(self._first[index], index - self._reach), min(self._last[index], index + self._reach)
        others = [i for i in range(first, last + 1) if i != index]
        return int(np.random.choice(others)) if others else index
