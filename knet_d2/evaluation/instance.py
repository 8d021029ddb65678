"""Average precision of instances, by COCO's own program."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import COCOeval_opt, instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO

from ..data.build import warn_of_absent_classes
from ..data.classes import ClassTable, loaded_metadata
from ..data.coco_json import check_for_evaluation, read_coco_json
from ..errors import DataError
from ..tasks import TASKS

logger = logging.getLogger(__name__)

# In the order of COCOeval.stats.
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# Of each image, COCO's AP counts this many detections.
_MAX_DETECTIONS = 100


class InstanceEvaluator(DatasetEvaluator):
    """AP of boxes and masks, with the same result keys and files as Detectron2's evaluator, but

    - the JSON is checked before, and annotations may have any ids;
    - panoptic data sets work, too, whose list of "thing_classes" has the stuff as well;
    - a data set that is a part of a JSON's images is evaluated on these alone;
    - a data set that was registered in Python needs no JSON;
    - "AP@<maximum>" stands beside AP where images have more instances than the 100 that AP counts.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, max_detections: int = _MAX_DETECTIONS) -> None:
        """
        Args:
            dataset_name: as registered; its ground truth is "json_file" of its metadata, else its records.
            output_dir: where predictions are written; None: nowhere.
            max_detections: instances of an image that the model gives, TEST.DETECTIONS_PER_IMAGE.
        """
        metadata = loaded_metadata(dataset_name)
        json_file = metadata.get("json_file")
        self._truth = read_coco_json(json_file) if json_file else _ground_truth_of_records(dataset_name)
        check_for_evaluation(self._truth, json_file or f"Data set {dataset_name}")
        self._metadata = metadata
        self._image_ids = metadata.get("image_ids")
        table = ClassTable.from_metadata(metadata, TASKS["instance"])
        self._names = table.names
        contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
        dataset_ids = (
            {i: i for i in table.category_ids} if contiguous is None else {v: k for k, v in contiguous.items()}
        )
        self._category_ids = [dataset_ids[i] for i in table.category_ids]
        self._output_dir = output_dir
        self._max_detections = max_detections

    def reset(self) -> None:
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: with "image_id".
            outputs: with "instances".
        """
        for image, output in zip(inputs, outputs, strict=True):
            instances = instances_to_coco_json(output["instances"].to("cpu"), image["image_id"])
            for instance in instances:
                instance["category_id"] = self._category_ids[instance["category_id"]]
            self._predictions.append({"image_id": image["image_id"], "instances": instances})

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns {"segm": {"AP", "AP50", ..., "AP-<class>"}, "bbox": ...} in percent, on the main process."""
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = [x for part in gathered for x in part]
        instances = [x for image in predictions for x in image["instances"]]
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            torch.save(predictions, os.path.join(self._output_dir, "instances_predictions.pth"))
            with open(os.path.join(self._output_dir, "coco_instances_results.json"), "w") as f:
                json.dump(instances, f)
        if "annotations" not in self._truth:
            logger.info("No annotations to evaluate on: the predictions are written only.")
            return None
        of_class = Counter(x["category_id"] for x in self._truth["annotations"] if not x["iscrowd"])
        absent = [name for i, name in zip(self._category_ids, self._names, strict=True) if not of_class[i]]
        warn_of_absent_classes(self._metadata.name, absent, "instance")
        if not instances:  # for which COCO's program fails
            logger.warning("The model predicts no instance at all: AP is not a number.")
            return {kind: dict.fromkeys(_METRICS, float("nan")) for kind in ("bbox", "segm")}
        truth = COCO()
        # Copies, since COCO's program writes into the annotations; numbered, since it takes the id 0 for "no match".
        annotations = [{**x, "id": i} for i, x in enumerate(self._truth["annotations"], 1)]
        truth.dataset = {**self._truth, "annotations": annotations}
        truth.createIndex()
        return {kind: self._average_precision(truth, instances, kind) for kind in ("bbox", "segm")}

    def _most_instances(self, image_ids: Iterable[Any]) -> int:
        """The largest number of instances in one of the images."""
        counted = Counter(x["image_id"] for x in self._truth["annotations"] if not x["iscrowd"])
        return max(counted[i] for i in image_ids)

    def _average_precision(self, truth: COCO, instances: list[dict[str, Any]], kind: str) -> dict[str, float]:
        """kind: "bbox" or "segm", where a "bbox" would be taken for the mask's size."""
        left_out = "bbox" if kind == "segm" else None
        detections = truth.loadRes([{k: v for k, v in x.items() if k != left_out} for x in instances])
        evaluation = COCOeval_opt(truth, detections, kind)
        if self._image_ids is not None:
            evaluation.params.imgIds = self._image_ids
        most = self._most_instances(evaluation.params.imgIds)
        beyond = min(most, self._max_detections) > _MAX_DETECTIONS
        if beyond:
            evaluation.params.maxDets = [*evaluation.params.maxDets, self._max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        metrics = dict(zip(_METRICS, (_percent(x) for x in evaluation.stats), strict=False))
        logger.info("Evaluation results of %s:\n%s", kind, create_small_table(metrics))
        precisions = evaluation.eval["precision"][:, :, :, 0]  # [thresholds of IoU, recalls, classes, maximums]
        if beyond:
            metrics[f"AP@{self._max_detections}"] = _mean(precisions[..., -1])
            logger.info(
                "An image has %d instances, but COCO's AP counts %d detections of an image; with TEST."
                "DETECTIONS_PER_IMAGE = %d detections, AP of %s is %.3f.",
                *(most, _MAX_DETECTIONS, self._max_detections, kind, _mean(precisions[..., -1])),
            )
        if len(self._names) > 1:
            precision = precisions[..., 2]
            of_class = {f"AP-{name}": _mean(precision[..., i]) for i, name in enumerate(self._names)}
            logger.info("%s of each class: %s", kind, ", ".join(f"{k[3:]} {v:.1f}" for k, v in of_class.items()))
            metrics.update(of_class)
        return metrics


def _ground_truth_of_records(name: str) -> dict[str, Any]:
    """The records of a data set in COCO's format."""
    try:
        return convert_to_coco_dict(name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"The records of data set {name} can't be evaluated ({type(error).__name__}: {error}). They need height, "
            "width, image_id, and in each annotation bbox, bbox_mode, category_id and segmentation (polygons or RLE)."
        ) from error


def _mean(precision: np.ndarray) -> float:
    """Mean of what is there, in percent: -1 stands for what can't be computed."""
    return 100 * float(precision[precision > -1].mean()) if (precision > -1).any() else float("nan")


def _percent(x: float) -> float:
    return 100 * float(x) if x >= 0 else float("nan")
