"""Compare trackers on moving shapes: a model's kernels beside a plain IoU tracker, with the same detections.

    python -m checks.video output/shapes_panoptic/model_final.pth

This prints a Markdown table. Both trackers get the things of the same panoptic maps, and start tracks above the same
score. "ids kept" is the share of the ids that are the same before and after a crossing of look-alikes, of the things
that are seen on both sides. The model is of the data set shapes, or of moving shapes.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_on_dataset

import knet_d2
from knet_d2.data import build_test_loader
from knet_d2.video.evaluators import VideoInstanceEvaluator, VideoPanopticEvaluator
from knet_d2.video.model import TrackingKNet
from knet_d2.video.tracker import NO_TRACK

DATASET = "moving_shapes_panoptic_val"
METRICS = {"video_panoptic": ("STQ", "AQ", "SQ", "VPQ"), "video_instance": ("AP",)}


class IouTracker:
    """A thing joins the track of its class whose last mask it overlaps most, if the IoU is above a threshold."""

    def __init__(self, min_iou: float, memory: int):
        """
        Args:
            memory: number of successive frames that a track may miss.
        """
        self._min_iou, self._memory = min_iou, memory
        self._frame, self._next_id = 0, 1
        self._tracks: dict[int, tuple[int, np.ndarray, int]] = {}  # id: class, last mask, last frame

    def __call__(self, labels: Sequence[int], masks: Sequence[np.ndarray], starts: Sequence[bool]) -> list[int]:
        """The ids of a frame's things; NO_TRACK for those without a track that may not start one."""
        pairs = [
            (_iou(mask, last), i, track)
            for i, (label, mask) in enumerate(zip(labels, masks))
            for track, (of_track, last, _) in self._tracks.items()
            if label == of_track
        ]
        ids: dict[int, int] = {}
        for iou, i, track in sorted(pairs, reverse=True):
            if iou > self._min_iou and i not in ids and track not in ids.values():
                ids[i] = track
        for i in range(len(labels)):
            if i not in ids and starts[i]:
                ids[i], self._next_id = self._next_id, self._next_id + 1
            if i in ids:
                self._tracks[ids[i]] = labels[i], masks[i], self._frame
        self._tracks = {k: x for k, x in self._tracks.items() if self._frame - x[2] <= self._memory}
        self._frame += 1
        return [ids.get(i, NO_TRACK) for i in range(len(labels))]


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def ids_kept(crossings: list[dict[str, Any]], ids: Callable[[Any, int, int], int | None], num_frames: int) -> float:
    """The share of ids that are the same before and after crossings of look-alikes, NaN if none is seen.

    Args:
        crossings: content of crossings.json.
        ids: (video, frame, true track) -> the id that the tracker gave to it, or None.
    """
    kept = []
    for crossing in crossings:
        if crossing["look_alike"]:
            for track in crossing["tracks"]:
                before = _first(ids, crossing["video_id"], track, range(int(np.floor(crossing["time"])) - 1, -1, -1))
                after = _first(ids, crossing["video_id"], track, range(int(np.ceil(crossing["time"])) + 1, num_frames))
                if before is not None and after is not None:
                    kept.append(before == after)
    return float(np.mean(kept)) if kept else float("nan")


def _first(ids: Callable[[Any, int, int], int | None], video: Any, track: int, frames: range) -> int | None:
    """The id in the first of the frames in which the thing has one, of at most 5."""
    found = (ids(video, t, track) for t in frames[:5])
    return next((x for x in found if x is not None), None)


class TrackingIou(torch.nn.Module):
    """A :class:`TrackingKNet` whose ids of things are replaced by those of an :class:`IouTracker`."""

    def __init__(self, cfg: Any, model: torch.nn.Module, min_iou: float):
        super().__init__()
        video = cfg.MODEL.KNET.VIDEO
        self._model, self._min_iou, self._memory, self._new = model, min_iou, video.MEMORY, video.NEW_TRACK_SCORE
        self._video: Any = None

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._follow(x, self._model([x])[0]) for x in batched_inputs]

    def _follow(self, x: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        if x["video_id"] != self._video:
            self._video, self._tracker = x["video_id"], IouTracker(self._min_iou, self._memory)
        segment_map, segments = output["panoptic_seg"]
        ids, things = segment_map.numpy(), [x for x in segments if x["isthing"]]
        columns = [x["category_id"] for x in things], [ids == x["id"] for x in things]
        found = iter(self._tracker(*columns, [x["score"] > self._new for x in things]))
        followed = []
        for segment in segments:
            track_id = 1000 + next(found) if segment["isthing"] else 1 + segment["category_id"]
            if track_id == 1000 + NO_TRACK:
                segment_map[segment_map == segment["id"]] = 0
            else:
                followed.append({**segment, "track_id": track_id})
        return {"panoptic_seg": (segment_map, followed)}


class IdCollector(VideoPanopticEvaluator):
    """Also collects which predicted id covers most of each true thing."""

    def __init__(self, dataset_name: str):
        super().__init__(dataset_name)
        self._masks = VideoInstanceEvaluator(dataset_name, "panoptic_seg")

    def reset(self) -> None:
        super().reset()
        self.ids: dict[tuple[Any, int, int], int] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        super().process(inputs, outputs)
        for frame, output in zip(inputs, outputs):
            predicted = self._masks._of_segments(output)
            true = self._masks._truth(self._records[frame["image_id"]], predicted.masks.shape[1:])
            for track, mask in zip(true.ids, true.masks):
                ious = [_iou(mask, x) for x in predicted.masks]
                if ious and max(ious) > 0.3:
                    t = int(frame["image_id"].rpartition("/")[2])
                    self.ids[frame["video_id"], t, track] = int(predicted.ids[int(np.argmax(ious))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("--dataset", default=DATASET, help="a registered panoptic set of moving shapes")
    parser.add_argument("--min-iou", type=float, nargs="+", default=[0.1, 0.3], help="of the IoU tracker")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")
    args = parser.parse_args()
    predictor = knet_d2.load(args.weights, device="cpu", opts=args.opts)
    cfg, model = predictor.cfg, predictor.model
    cfg.DATASETS.TEST = (args.dataset,)
    loader = build_test_loader(cfg, args.dataset)
    with open(os.path.join(os.path.dirname(MetadataCatalog.get(args.dataset).image_root), "crossings.json")) as f:
        crossings = json.load(f)
    columns = [key for keys in METRICS.values() for key in keys]
    print("| tracker | " + " | ".join(columns) + " | ids kept |\n|---|" + "---|" * (len(columns) + 1))
    models = {"kernels": TrackingKNet(cfg, model)}
    models |= {f"IoU above {x}": TrackingIou(cfg, model, x) for x in args.min_iou}
    for name, tracking in models.items():
        panoptic, instances = IdCollector(args.dataset), VideoInstanceEvaluator(args.dataset, "panoptic_seg")
        results: dict[str, Any] = inference_on_dataset(tracking, loader, [panoptic, instances])
        kept = ids_kept(crossings, lambda *key, ids=panoptic.ids: ids.get(key), 10**6)
        values = [results[part][key] for part, keys in METRICS.items() for key in keys]
        print(f"| {name} | " + " | ".join(f"{x:.1f}" for x in [*values, 100 * kept]) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
