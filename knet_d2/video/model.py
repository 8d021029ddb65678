"""A K-Net that follows objects through the frames of a video."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import nn

from ..errors import ConfigError
from ..modeling.postprocessing import ImageLogits
from ..modeling.postprocessing.rules import masks_to_boxes
from ..modeling.structures import KernelMemory
from . import tracker
from .tracker import NO_TRACK, Detections, TrackerOptions, TrackerState

VIDEO_EVALUATORS = ("video_panoptic", "video_instance")


def tracker_options(cfg: CfgNode) -> TrackerOptions:
    """The options of MODEL.KNET.VIDEO, checked.

    Raises:
        ConfigError: a value makes no sense.
    """
    video = cfg.MODEL.KNET.VIDEO
    for key in ("MIN_SCORE", "NEW_TRACK_SCORE", "MATCH_THRESHOLD", "MOMENTUM"):
        if not 0 <= video[key] <= 1:
            raise ConfigError(f"MODEL.KNET.VIDEO.{key} = {video[key]}: use 0 to 1.")
    if not -1 <= video.MIN_COSINE <= 1:
        raise ConfigError(f"MODEL.KNET.VIDEO.MIN_COSINE = {video.MIN_COSINE}: use -1 to 1.")
    if not video.TEMPERATURE > 0:
        raise ConfigError(f"MODEL.KNET.VIDEO.TEMPERATURE = {video.TEMPERATURE}: use more than 0.")
    if video.MEMORY < 0:
        raise ConfigError(f"MODEL.KNET.VIDEO.MEMORY = {video.MEMORY}: use 0 or more frames.")
    return TrackerOptions(
        min_score=video.MIN_SCORE,
        new_track_score=video.NEW_TRACK_SCORE,
        match_threshold=video.MATCH_THRESHOLD,
        min_cosine=video.MIN_COSINE,
        temperature=video.TEMPERATURE,
        momentum=video.MOMENTUM,
        memory=video.MEMORY,
        overlap_threshold=cfg.MODEL.KNET.TEST.OVERLAP_THRESHOLD,
    )


class TrackingKNet(nn.Module):
    """A K-Net with a memory; it is called as the model is, with frames in their order.

    Its results are those of the model with ids:

    * "instances" have ``track_ids``, int64 [n]; each pixel belongs to one instance at most.
    * segments of "panoptic_seg" have "track_id". The S stuff classes have the ids 1 to S, in every video the same.

    Ids of things begin with S + 1. Things that neither join nor start a track are left out. "sem_seg" stays as it is,
    and so do images that are of no video.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        """
        Args:
            model: a KNet, or one wrapped for distributed training.
        """
        super().__init__()
        if cfg.TEST.AUG.ENABLED:
            raise ConfigError("TEST.AUG.ENABLED = True: kernels of several views can't be tracked; set it to False.")
        self.model: Any = getattr(model, "module", model)
        self.options = tracker_options(cfg)
        bank = self.model.bank
        self._first_id = 1 + bank.num_classes - bank.num_things
        self._stuff_ids = {c: i for i, c in enumerate(self.model.postprocessor.category_ids[bank.num_things :], 1)}
        self._states: dict[str, TrackerState] = {}
        self._video: Any = None
        self._memory: KernelMemory | None = None
        self.train(model.training)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Args:
            batched_inputs: as for the model, and "video_id" of the frame's video; another one than before starts a new
                memory.
        """
        if self.model.video is None or not self.model.video.uses_memory:
            predictions = self.model(batched_inputs, do_postprocess=False)
            return [self.follow(x, prediction) for x, prediction in zip(batched_inputs, predictions)]
        return [self.follow(x, self.predict(x)) for x in batched_inputs]

    def predict(self, x: dict[str, Any]) -> ImageLogits:
        """The logits of an image, or of a frame by the kernels of the frame before it; :meth:`follow` comes next."""
        is_next = "video_id" in x and x["video_id"] == self._video
        (prediction,) = self.model.predict_logits([x], self._memory if is_next else None)
        if "video_id" in x:
            self._memory = KernelMemory.of_frame(prediction.kernels[None])
        return prediction

    def follow(self, x: dict[str, Any], prediction: ImageLogits) -> dict[str, Any]:
        """The results of an image, or of a frame with ids."""
        results = self.model.postprocessor
        if "video_id" not in x:
            return results(prediction)
        if x["video_id"] != self._video:
            self._video, self._states = x["video_id"], {}
        follow = {"instances": self._instances, "panoptic_seg": self._panoptic}
        return {
            key: follow[key](*results.with_embeddings(key, prediction))
            if key in follow
            else results(prediction, results.options._replace(outputs=(key,)))[key]
            for key in results.options.outputs
        }

    def _instances(self, instances: Instances, embeddings: torch.Tensor) -> Instances:
        likely = instances.scores > self.options.min_score
        instances, embeddings = instances[likely], embeddings[likely]
        scores, masks = instances.scores.cpu().numpy(), instances.pred_masks.cpu().numpy()
        kept, owned = tracker.one_owner(masks, scores, self.options.overlap_threshold)
        ids = self._step("instances", instances.pred_classes.cpu().numpy()[kept], scores[kept], embeddings[kept])
        followed = ids != NO_TRACK
        device, rows = instances.scores.device, kept[followed]
        owned_masks = torch.from_numpy(owned[followed]).to(device)
        return Instances(
            instances.image_size,
            pred_boxes=Boxes(masks_to_boxes(owned_masks)),
            scores=instances.scores[rows],
            pred_classes=instances.pred_classes[rows],
            pred_masks=owned_masks,
            track_ids=torch.from_numpy(ids[followed]).to(device),
        )

    def _panoptic(
        self, result: tuple[torch.Tensor, list[dict[str, Any]]], embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        segment_map, segments = result
        things = [i for i, x in enumerate(segments) if x["isthing"]]
        labels = np.array([segments[i]["category_id"] for i in things], np.int64)
        ids = self._step("panoptic_seg", labels, np.array([segments[i]["score"] for i in things]), embeddings[things])
        of_thing = dict(zip(things, ids.tolist()))
        track_ids = [of_thing.get(i, self._stuff_ids.get(x["category_id"])) for i, x in enumerate(segments)]
        lookup = torch.tensor([0, *(x["id"] if i else 0 for x, i in zip(segments, track_ids))], dtype=torch.int32)
        followed = [{**x, "track_id": i} for x, i in zip(segments, track_ids) if i]
        return lookup.to(segment_map.device)[segment_map.long()], followed

    def _step(self, output: str, labels: np.ndarray, scores: np.ndarray, embeddings: torch.Tensor) -> np.ndarray:
        """The track id of each detection, from the memory of one output, which is updated."""
        state = self._states.get(output) or tracker.new_state(self._first_id)
        detections = Detections(labels, scores, embeddings.float().cpu().numpy())
        self._states[output], ids = tracker.step(state, detections, self.options)
        return ids


def follow_videos(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model for an evaluation: with a memory if a data set of DATASETS.TEST is of videos, else as it is."""
    kinds = [MetadataCatalog.get(name).get("evaluator_type") for name in cfg.DATASETS.TEST]
    return TrackingKNet(cfg, model) if any(kind in VIDEO_EVALUATORS for kind in kinds) else model
