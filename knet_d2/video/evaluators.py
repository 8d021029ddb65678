"""Detectron2 evaluators of videos: STQ and VPQ of panoptic results, AP of tracks.

The model is a :class:`.model.TrackingKNet`. Frames come video by video, see :class:`knet_d2.data.sampler.VideoSampler`.
A process keeps of a video no more than numbers. Processes gather whole videos.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Hashable
from typing import Any

import numpy as np
from detectron2.data import transforms as T
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from ..data.classes import loaded_metadata
from ..data.mapper import annotation_mask, read_panoptic_segments
from ..data.records import load_dataset
from ..errors import DataError
from .precision import METRICS, TrackMasks, VideoTracks, average_precision
from .quality import (
    VOID,
    LabelMaps,
    PanopticQuality,
    TrackingQuality,
    overlap_table,
    summarize_panoptic,
    summarize_tracking,
)

logger = logging.getLogger(__name__)


class _VideoEvaluator(DatasetEvaluator):
    """Compares frame by frame, and collects something of each video."""

    name: str
    """Key of the results."""

    def __init__(self, dataset_name: str):
        self._metadata = loaded_metadata(dataset_name)
        self._dataset_name = dataset_name
        self._records = {x["image_id"]: x for x in load_dataset(dataset_name)}

    def reset(self) -> None:
        self._videos: dict[Hashable, Any] = {}
        self._num_frames = 0

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with "image_id" and "video_id".
            outputs: of a :class:`.model.TrackingKNet`.
        """
        for frame, output in zip(inputs, outputs, strict=True):
            if frame["video_id"] not in self._videos:
                self._videos[frame["video_id"]] = self._new_video()
            self._add(self._videos[frame["video_id"]], self._records[frame["image_id"]], output)
            self._num_frames += 1

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return the metrics in percent; None except on the main process.

        Raises:
            DataError: not all frames of the data set were evaluated.
        """
        comm.synchronize()
        gathered = comm.gather((self._videos, self._num_frames))
        if not comm.is_main_process():
            return None
        videos = {key: video for part, _ in gathered for key, video in part.items()}
        num_frames = sum(count for _, count in gathered)
        if num_frames != len(self._records):
            raise DataError(
                f"Data set {self._dataset_name}: {num_frames} of {len(self._records)} frames were evaluated. Evaluate "
                "all of them."
            )
        # In one order, so that sums do not depend on the number of processes
        metrics = self._summarize([videos[key] for key in sorted(videos, key=str)])
        metrics = {key: 100 * value for key, value in metrics.items()}
        logger.info("Results of %d videos (%s):\n%s", len(videos), self.name, create_small_table(self._main(metrics)))
        return {self.name: metrics}

    def _main(self, metrics: dict[str, float]) -> dict[str, float]:
        """Those that are shown."""
        return metrics

    @abstractmethod
    def _new_video(self) -> Any: ...

    @abstractmethod
    def _add(self, video: Any, record: dict[str, Any], output: dict[str, Any]) -> None: ...

    @abstractmethod
    def _summarize(self, videos: list[Any]) -> dict[str, float]: ...


class VideoPanopticEvaluator(_VideoEvaluator):
    """Computes STQ, AQ, SQ and VPQ of "panoptic_seg".

    Classes are the contiguous ids of the metadata. Crowds of things are those of both metrics. VPQ is computed for the
    "windows" of the metadata, numbers of labelled frames.
    """

    name = "video_panoptic"

    def __init__(self, dataset_name: str):
        super().__init__(dataset_name)
        self._things = sorted(self._metadata.thing_dataset_id_to_contiguous_id.values())
        self._num_classes = len(self._metadata.stuff_classes)
        self._windows = self._metadata.windows

    def _new_video(self) -> tuple[TrackingQuality, PanopticQuality]:
        return (
            TrackingQuality(self._num_classes, self._things),
            PanopticQuality(self._num_classes, self._things, self._windows),
        )

    def _add(
        self, video: tuple[TrackingQuality, PanopticQuality], record: dict[str, Any], output: dict[str, Any]
    ) -> None:
        ids, segments = output["panoptic_seg"]
        found = np.zeros((max([0, *(x["id"] for x in segments)]) + 1, 2), np.int64)
        found[:, 0] = VOID
        for x in segments:
            found[x["id"]] = x["category_id"], x["track_id"]
        predicted = found[ids.cpu().numpy()]
        _, index = read_panoptic_segments(record, predicted.shape[:2])
        known = [
            (x["category_id"], 0 if x["isthing"] and x.get("iscrowd", 0) else x["id"]) for x in record["segments_info"]
        ]
        true = np.array([*known, (VOID, 0)], np.int64)[index]
        table = overlap_table(*(LabelMaps(x[..., 0], x[..., 1]) for x in (true, predicted)))
        for quality in video:
            quality.add(table)

    def _summarize(self, videos: list[tuple[TrackingQuality, PanopticQuality]]) -> dict[str, float]:
        tracking = [(quality.confusion, *quality.association()) for quality, _ in videos]
        if not any(count for _, _, count in tracking):
            logger.warning("Data set %s has no tracks: AQ and STQ are 0.", self._dataset_name)
        counts = [quality.counts for _, quality in videos]
        return summarize_tracking(tracking) | summarize_panoptic(counts, self._things, self._windows)

    def _main(self, metrics: dict[str, float]) -> dict[str, float]:
        keys = ["STQ", "AQ", "SQ", "VPQ", "VPQ_th", "VPQ_st", *(f"VPQ@{k}" for k in self._windows)]
        return {key: metrics[key] for key in keys}


class VideoInstanceEvaluator(_VideoEvaluator):
    """Computes AP and AR of tracks, of "instances" or of the things in "panoptic_seg"."""

    name = "video_instance"

    def __init__(self, dataset_name: str, output: str):
        """
        Args:
            output: key of the output.
        """
        super().__init__(dataset_name)
        self._output = output
        self._categories = sorted(self._metadata.thing_dataset_id_to_contiguous_id.values())
        self._names = [self._metadata.thing_classes[i] for i in self._categories]

    def _new_video(self) -> VideoTracks:
        return VideoTracks()

    def _add(self, video: VideoTracks, record: dict[str, Any], output: dict[str, Any]) -> None:
        predicted = self._of_instances(output) if self._output == "instances" else self._of_segments(output)
        video.add(self._truth(record, predicted.masks.shape[1:]), predicted)

    def _of_instances(self, output: dict[str, Any]) -> TrackMasks:
        found = output["instances"].to("cpu")
        columns = found.track_ids.tolist(), found.pred_classes.tolist(), found.pred_masks.numpy(), found.scores.tolist()
        return TrackMasks(*columns, [False] * len(found))

    def _of_segments(self, output: dict[str, Any]) -> TrackMasks:
        ids, segments = output["panoptic_seg"]
        ids, things = ids.cpu().numpy(), [x for x in segments if x["isthing"]]
        return TrackMasks(
            [x["track_id"] for x in things],
            [self._categories.index(x["category_id"]) for x in things],
            np.array([ids == x["id"] for x in things], bool).reshape(-1, *ids.shape),
            [x["score"] for x in things],
            [False] * len(things),
        )

    def _truth(self, record: dict[str, Any], size: tuple[int, int]) -> TrackMasks:
        if "annotations" in record:
            objects = record["annotations"]
            nothing: Any = T.TransformList([])
            masks = [annotation_mask(x, nothing, size, size, record) for x in objects]
            ids = [x["track_id"] for x in objects]
        else:
            _, index = read_panoptic_segments(record, size)
            places = [i for i, x in enumerate(record["segments_info"]) if x["isthing"]]
            objects = [record["segments_info"][i] for i in places]
            masks, ids = [index == i for i in places], [x["id"] for x in objects]
        return TrackMasks(
            ids,
            [self._categories.index(x["category_id"]) for x in objects],
            np.array(masks, bool).reshape(-1, *size),
            [1.0] * len(objects),
            [bool(x.get("iscrowd", 0)) for x in objects],
        )

    def _summarize(self, videos: list[VideoTracks]) -> dict[str, float]:
        metrics, of_class = average_precision(videos, len(self._names))
        return metrics | {f"AP-{name}": value for name, value in zip(self._names, of_class, strict=True)}

    def _main(self, metrics: dict[str, float]) -> dict[str, float]:
        return {key: metrics[key] for key in METRICS}
