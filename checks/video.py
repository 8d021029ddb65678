"""Compare trackers on videos: a model's kernels beside a plain IoU tracker, with the same detections.

    python -m checks.video output/shapes_panoptic/model_final.pth
    python -m checks.video output/moving_shapes_kae/model_final.pth --trackers embeddings kernels
    python -m checks.video output/my_model/model_final.pth --config-file my_config.yaml --dataset my_videos

This prints a Markdown table. All trackers get the things of the same panoptic maps, and start tracks above the same
score. "embeddings" are what a model is followed by: those that it learned with MODEL.KNET.VIDEO.EMBEDDING, or the
mean features under the masks of a model with RESIDUAL_MASKS. "kernels" are the kernels of any model, "iou" an IoU
tracker, "byte" ByteTrack by the package trackers, which has to be installed (pip install trackers); its tracks have
an id from their second frame on. "truth" knows the true ids: what it misses, the segments miss, and not the tracker.

The videos are moving shapes, or any other panoptic videos whose classes the panoptic model has (docs/DATASETS.md).
What is said of crossings needs their list, which moving shapes have. "ids kept" is the share of the ids that are the
same before and after a crossing, of the things that are seen on both sides: of look-alikes, and of things of two
classes. "nearest" is how often a vector by which things are followed is most like that of the same thing in the next
frame, of the things of its class there, if there are others: of all things, and of look-alikes at most one frame
before or after they cross.
"""

import argparse
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tabulate import tabulate
from tqdm import tqdm

from knet_d2.data import build_test_loader
from knet_d2.modeling.meta_arch import KNet
from knet_d2.modeling.postprocessing import ImageLogits, PostProcessor
from knet_d2.programs.arguments import add_config_arguments, load_predictor
from knet_d2.video.evaluators import VideoInstanceEvaluator, VideoPanopticEvaluator
from knet_d2.video.model import TrackingKNet
from knet_d2.video.tracker import NO_TRACK

DATASET = "moving_shapes_panoptic_val"
# Ids of stuff are 1 + the class; those of things are above this
MOST_CLASSES = 1000
SAME_THING_IOU = 0.3
TRACKERS = ("embeddings", "kernels", "iou", "byte", "truth")
METRICS = {"video_panoptic": ("STQ", "AQ", "SQ", "VPQ"), "video_instance": ("AP",)}


class IouTracker:
    """A thing joins the track of its class whose last mask it overlaps most, if the IoU is above a threshold."""

    def __init__(self, min_iou: float, memory: int, new_track_score: float):
        """
        Args:
            memory: number of successive frames that a track may miss.
            new_track_score: things start tracks above this score.
        """
        self._min_iou, self._memory, self._new = min_iou, memory, new_track_score
        self._frame, self._next_id = 0, 1
        self._tracks: dict[int, tuple[int, np.ndarray, int]] = {}  # id: class, last mask, last frame

    def __call__(self, labels: Sequence[int], masks: Sequence[np.ndarray], scores: Sequence[float]) -> list[int]:
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
            if i not in ids and scores[i] > self._new:
                ids[i], self._next_id = self._next_id, self._next_id + 1
            if i in ids:
                self._tracks[ids[i]] = labels[i], masks[i], self._frame
        self._tracks = {k: x for k, x in self._tracks.items() if self._frame - x[2] <= self._memory}
        self._frame += 1
        return [ids.get(i, NO_TRACK) for i in range(len(labels))]


class ByteTracker:
    """ByteTrack (arXiv:2110.06864) of the package trackers, which sees the boxes of masks; one for each class."""

    def __init__(self, memory: int, new_track_score: float):
        """
        Args:
            memory, new_track_score: see :class:`IouTracker`.
        """
        import supervision
        import trackers

        self._supervision = supervision
        self._new_tracker = functools.partial(
            trackers.ByteTrackTracker,
            lost_track_buffer=memory,  # frames, at the default rate
            track_activation_threshold=new_track_score,
            high_conf_det_threshold=new_track_score,  # the tracks of other detections begin with those above it
            minimum_consecutive_frames=1,
        )
        self._trackers: dict[int, Any] = {}

    def __call__(self, labels: Sequence[int], masks: Sequence[np.ndarray], scores: Sequence[float]) -> list[int]:
        """See :meth:`IouTracker.__call__`."""
        ids = [NO_TRACK] * len(labels)
        for label in {*labels, *self._trackers}:
            rows = np.array([i for i, x in enumerate(labels) if x == label], int)
            found = self._supervision.Detections.empty()
            if len(rows):
                boxes = self._supervision.mask_to_xyxy(np.stack([masks[i] for i in rows])) + [0, 0, 1, 1]
                found = self._supervision.Detections(
                    boxes.astype(np.float32), confidence=np.array(scores)[rows], data={"row": rows}
                )
            if label not in self._trackers:
                self._trackers[label] = self._new_tracker()
            tracked = self._trackers[label].update(found)
            for row, track in zip(tracked.data.get("row", ()), tracked.tracker_id if len(tracked) else ()):
                if track >= 0:  # -1: neither joins nor starts a track
                    ids[row] = 1 + label + MOST_CLASSES * int(track)
        return ids


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def ids_kept(
    crossings: list[dict[str, Any]],
    ids: Callable[[Any, int, int], int | None],
    num_frames: int,
    look_alike: bool = True,
) -> float:
    """The share of ids that are the same before and after crossings of one kind, NaN if none is seen.

    Args:
        crossings: content of crossings.json.
        ids: (video, frame, true track) -> the id that the tracker gave to it, or None.
        look_alike: the kind: of look-alikes, or of things of two classes.
    """
    kept = []
    for crossing in crossings:
        if crossing["look_alike"] == look_alike:
            for track in crossing["tracks"]:
                before = _first(ids, crossing["video_id"], track, range(int(np.floor(crossing["time"])) - 1, -1, -1))
                after = _first(ids, crossing["video_id"], track, range(int(np.ceil(crossing["time"])) + 1, num_frames))
                if before is not None and after is not None:
                    kept.append(before == after)
    return float(np.mean(kept)) if kept else float("nan")


def _first(ids: Callable[[Any, int, int], int | None], video: Any, track: int, frames: range) -> int | None:
    """The id in the first frame in which the thing has one; at most 5 frames are looked at."""
    found = (ids(video, t, track) for t in frames[:5])
    return next((x for x in found if x is not None), None)


class TrackingMasks:
    """Follows the things of panoptic maps by a tracker that sees masks; see :meth:`TrackingKNet.follow`."""

    def __init__(self, results: PostProcessor, new_tracker: Callable[[], Any]):
        """
        Args:
            results: of the model.
            new_tracker: makes the tracker of a video, called as an :class:`IouTracker` is.
        """
        self._results, self._new_tracker = results, new_tracker
        self._video: Any = None

    def follow(self, x: dict[str, Any], prediction: ImageLogits) -> dict[str, Any]:
        if x["video_id"] != self._video:
            self._video, self._tracker = x["video_id"], self._new_tracker()
        output = self._results(prediction)
        segment_map, segments = output["panoptic_seg"]
        found = iter(self._ids(x, segment_map.numpy(), [x for x in segments if x["isthing"]]))
        followed = []
        for segment in segments:
            track_id = MOST_CLASSES + next(found) if segment["isthing"] else 1 + segment["category_id"]
            if track_id == MOST_CLASSES + NO_TRACK:
                segment_map[segment_map == segment["id"]] = 0
            else:
                followed.append({**segment, "track_id": track_id})
        return {"panoptic_seg": (segment_map, followed)}

    def _ids(self, x: dict[str, Any], segment_map: np.ndarray, things: list[dict[str, Any]]) -> Sequence[int]:
        """The ids of a frame's things, NO_TRACK for none."""
        columns = [x["category_id"] for x in things], [segment_map == x["id"] for x in things]
        return self._tracker(*columns, [x["score"] for x in things])


class TrackingTruth(TrackingMasks):
    """Gives things the id of the true thing that they overlap most, whatever their classes; others get new ids."""

    def __init__(self, results: PostProcessor, dataset_name: str):
        super().__init__(results, functools.partial(itertools.count, MOST_CLASSES))
        self._truth = VideoInstanceEvaluator(dataset_name, "panoptic_seg")

    def _ids(self, x: dict[str, Any], segment_map: np.ndarray, things: list[dict[str, Any]]) -> Sequence[int]:
        true = self._truth._truth(self._truth._records[x["image_id"]], segment_map.shape)
        found = [_most_alike(segment_map == x["id"], true.masks) for x in things]
        return [next(self._tracker) if i is None else true.ids[i] for i in found]


def _most_alike(mask: np.ndarray, others: np.ndarray) -> int | None:
    """Index of the mask that this one overlaps most, if the IoU is above SAME_THING_IOU."""
    ious = [_iou(mask, x) for x in others]
    return int(np.argmax(ious)) if max(ious, default=0.0) > SAME_THING_IOU else None


class NextFrame:
    """How often a thing's vector is most like that of the same thing in the next frame, among those of its class."""

    def __init__(self, crossings: list[dict[str, Any]]):
        """
        Args:
            crossings: content of crossings.json.
        """
        self._crossings = [x for x in crossings if x["look_alike"]]
        self._last: tuple[Any, list[dict[str, Any]], torch.Tensor] = (None, [], torch.zeros(0))
        self._right: dict[bool, list[bool]] = {False: [], True: []}

    def add(self, frame: dict[str, Any], things: list[dict[str, Any]], vectors: torch.Tensor) -> None:
        """
        Args:
            things: segments with their class and the true id in "track_id"; only those of two frames count.
            vectors: of these, [n, C].
        """
        video, earlier, earlier_vectors = self._last
        self._last = frame["video_id"], things, vectors
        if video != frame["video_id"] or not earlier or not things:
            return
        cosines = F.normalize(earlier_vectors, dim=1) @ F.normalize(vectors, dim=1).T
        for thing, row in zip(earlier, cosines.tolist()):
            others = {x["track_id"]: c for x, c in zip(things, row) if x["category_id"] == thing["category_id"]}
            if thing["track_id"] in others and len(others) > 1:
                right = max(others, key=lambda i: others[i]) == thing["track_id"]
                self._right[self._crosses(frame, thing["track_id"] - MOST_CLASSES)].append(right)

    def _crosses(self, frame: dict[str, Any], track: int) -> bool:
        """Whether the thing crosses a look-alike at most one frame before or after the middle of the two frames."""
        of_track = [x for x in self._crossings if x["video_id"] == frame["video_id"] and track in x["tracks"]]
        return any(abs(x["time"] - _number(frame) + 0.5) <= 1 for x in of_track)

    def shares(self) -> dict[str, float]:
        """In percent, NaN where there are no such things."""
        parts = {"nearest, all": [*self._right[False], *self._right[True]], "nearest, look-alikes": self._right[True]}
        return {name: 100 * float(np.mean(part)) if part else float("nan") for name, part in parts.items()}


def _number(frame: dict[str, Any]) -> int:
    """Of a frame of moving shapes, from 0."""
    return int(frame["image_id"].rpartition("/")[2])


class IdCollector(VideoPanopticEvaluator):
    """Also collects the predicted id that overlaps each true thing most, if the IoU is above SAME_THING_IOU."""

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
                i = _most_alike(mask, predicted.masks)
                if i is not None:
                    self.ids[frame["video_id"], _number(frame), track] = int(predicted.ids[i])


def by_kernels(prediction: ImageLogits) -> ImageLogits:
    """Kernels in the place of the embeddings."""
    return prediction._replace(embeddings=prediction.kernels)


# By which vectors things are followed, of the trackers that use some
VECTORS: dict[str, Callable[[ImageLogits], ImageLogits]] = {"embeddings": lambda x: x, "kernels": by_kernels}


class TrackingKernels(TrackingKNet):
    """Follows objects by their kernels, whatever embeddings the model learned."""

    def follow(self, x: dict[str, Any], prediction: ImageLogits) -> dict[str, Any]:
        return super().follow(x, by_kernels(prediction))


def new_followers(
    cfg: CfgNode, model: KNet, trackers: Sequence[str], min_ious: Sequence[float], dataset: str
) -> dict[str, Any]:
    """From a name in the table to what follows objects."""
    rule = cfg.MODEL.KNET.VIDEO.MEMORY, cfg.MODEL.KNET.VIDEO.NEW_TRACK_SCORE
    followers: dict[str, Any] = {}
    for tracker in trackers:
        if tracker == "embeddings":
            followers["embeddings"] = TrackingKNet(cfg, model)
        elif tracker == "kernels":
            followers["kernels"] = TrackingKernels(cfg, model)
        elif tracker == "truth":
            followers["true ids"] = TrackingTruth(model.postprocessor, dataset)
        elif tracker == "byte":
            followers["ByteTrack"] = TrackingMasks(model.postprocessor, lambda: ByteTracker(*rule))
        else:
            makers = {x: functools.partial(IouTracker, x, *rule) for x in min_ious}
            followers |= {f"IoU above {x}": TrackingMasks(model.postprocessor, make) for x, make in makers.items()}
    return followers


@torch.no_grad()
def evaluate(cfg: CfgNode, model: KNet, followers: dict[str, Any], dataset: str) -> dict[str, dict[str, float]]:
    """The metrics of each follower by name; all get the same predictions."""
    crossings = _crossings(dataset)
    source, truth = TrackingKNet(cfg, model), TrackingTruth(model.postprocessor, dataset)
    next_frames = {name: NextFrame(crossings) for name in VECTORS if name in followers}
    of_maps = IdCollector if crossings else VideoPanopticEvaluator
    evaluators = {name: (of_maps(dataset), VideoInstanceEvaluator(dataset, "panoptic_seg")) for name in followers}
    for evaluator in itertools.chain(*evaluators.values()):
        evaluator.reset()
    for inputs in tqdm(build_test_loader(cfg, dataset), unit="frame", mininterval=5, disable=None):
        prediction = source.predict(inputs[0])
        source.follow(inputs[0], prediction)
        _, segments = truth.follow(inputs[0], prediction)["panoptic_seg"]
        things = [i for i, x in enumerate(segments) if x["isthing"]]
        for name, next_frame in next_frames.items():
            _, vectors = model.postprocessor.with_embeddings("panoptic_seg", VECTORS[name](prediction))
            next_frame.add(inputs[0], [segments[i] for i in things], vectors[things])
        for name, follower in followers.items():
            output = follower.follow(inputs[0], prediction)
            for evaluator in evaluators[name]:
                evaluator.process(inputs, [output])
    found = {}
    for name, (panoptic, instances) in evaluators.items():
        results: dict[str, Any] = {**panoptic.evaluate(), **instances.evaluate()}  # type: ignore[dict-item]
        found[name] = {key: results[part][key] for part, keys in METRICS.items() for key in keys}
        if crossings:
            for column, look_alike in (("ids kept, look-alikes", True), ("ids kept, two classes", False)):
                found[name][column] = 100 * ids_kept(
                    crossings, lambda *key, of=panoptic.ids: of.get(key), 10**6, look_alike
                )
        found[name] |= next_frames[name].shares() if name in next_frames else {}
    return found


def _crossings(dataset: str) -> list[dict[str, Any]]:
    """Content of the crossings.json of moving shapes; empty for other videos."""
    path = os.path.join(os.path.dirname(MetadataCatalog.get(dataset).image_root), "crossings.json")
    if not os.path.isfile(path):
        return []
    with open(path) as f:
        return json.load(f)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("--dataset", default=DATASET, help="panoptic videos, as of DATASETS.CUSTOM in --config-file")
    parser.add_argument("--trackers", nargs="+", choices=TRACKERS, default=["kernels", "iou"])
    parser.add_argument("--min-iou", type=float, nargs="+", default=[0.1, 0.3], help="of the IoU tracker")
    add_config_arguments(parser)
    args = parser.parse_args()
    predictor = load_predictor(args.weights, args, device="cpu")
    cfg, model = predictor.cfg, predictor.model
    cfg.DATASETS.TEST = (args.dataset,)
    followers = new_followers(cfg, model, args.trackers, args.min_iou, args.dataset)
    found = evaluate(cfg, model, followers, args.dataset)
    columns = dict.fromkeys(key for metrics in found.values() for key, x in metrics.items() if not math.isnan(x))
    rows = [[name, *map(metrics.get, columns)] for name, metrics in found.items()]
    print(tabulate(rows, ["tracker", *columns], tablefmt="pipe", floatfmt=".1f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
