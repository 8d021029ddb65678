"""Evaluates instances by average precision (AP), computed by COCO's own program."""

import contextlib
import io
import logging
import os
from collections import Counter
from typing import Any

import numpy as np
import torch
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import COCOeval_opt, instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO

from ..data.class_coverage import warn_of_absent_classes
from ..data.classes import ClassTable, loaded_metadata
from ..data.coco_json import check_for_evaluation, read_coco_json
from ..data.files import write_json
from ..errors import DataError
from ..tasks import TASKS
from .report.instances import instance_section
from .report.section import Section

logger = logging.getLogger(__name__)

# In the order of COCOeval.stats.
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# COCO's AP counts at most this many detections per image.
_MAX_DETECTIONS = 100
# Above this IoU a mask is an object's, in "masks_per_object".
_SAME_OBJECT = 0.7


class InstanceEvaluator(DatasetEvaluator):
    """Computes the AP of boxes and masks.

    The result keys and files are the same as those of Detectron2's evaluator. The differences are:

    - the JSON is checked first, and annotations may have any ids;
    - panoptic data sets are supported, whose "thing_classes" also contain the stuff classes;
    - if a data set is a part of a JSON's images, only these images are evaluated;
    - data sets that were registered in Python need no JSON;
    - if an image has more instances than the 100 that AP counts, the metric "AP@<maximum>" is added;
    - "masks_per_object" of "segm" tells twins, see :func:`masks_per_object`.

    Attributes:
        sections: what the report shows, after evaluate() on the main process; empty if there is nothing to show.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        max_detections: int = _MAX_DETECTIONS,
        report: bool = False,
    ) -> None:
        """
        Args:
            dataset_name: name of the data set; its ground truth is "json_file" of the metadata, else its records.
            output_dir: folder for the predictions; None: they are not written.
            max_detections: TEST.DETECTIONS_PER_IMAGE, the largest number of instances that the model finds per image.
            report: whether ``sections`` are made.
        """
        metadata = loaded_metadata(dataset_name)
        json_file = metadata.get("json_file")
        if json_file:
            self._truth = read_coco_json(json_file, metadata.get("image_root"))
        else:
            self._truth = _ground_truth_of_records(dataset_name)
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
        self._report = report
        self.sections: list[Section] = []

    def reset(self) -> None:
        self._predictions: list[dict[str, Any]] = []
        self.sections = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with "image_id".
            outputs: dicts with "instances", whose masks are "pred_masks" or "rles".
        """
        for image, output in zip(inputs, outputs, strict=True):
            found = output["instances"].to("cpu")
            instances = instances_to_coco_json(found, image["image_id"])
            if found.has("rles"):
                instances = [{**x, "segmentation": rle} for x, rle in zip(instances, found.rles, strict=True)]
            for instance in instances:
                instance["category_id"] = self._category_ids[instance["category_id"]]
            self._predictions.append({"image_id": image["image_id"], "instances": instances})

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return {"segm": {"AP", "AP50", ..., "AP-<class>"}, "bbox": ...} in percent; None except on the main process.

        If the ground truth has no annotations, the result is None and the predictions are only written.
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = [x for part in gathered for x in part]
        instances = [x for image in predictions for x in image["instances"]]
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            torch.save(predictions, os.path.join(self._output_dir, "instances_predictions.pth"))
            write_json(os.path.join(self._output_dir, "coco_instances_results.json"), instances)
        if "annotations" not in self._truth:
            logger.info("The data set has no annotations: the predictions are written, but not evaluated.")
            return None
        there = {x["category_id"] for x in self._evaluated_instances()}
        occurring = [i for i, category in enumerate(self._category_ids) if category in there]
        warn_of_absent_classes(self._metadata.name, "instance", self._names, occurring)
        if not instances:  # COCO's program fails without predictions
            logger.warning("The model predicts no instance in the whole data set: AP is NaN.")
            self._add_section(None)
            return {kind: dict.fromkeys(_METRICS, float("nan")) for kind in ("bbox", "segm")}
        truth = COCO()
        # Copy the annotations, because COCO's program writes into them. Number them from 1, because it reads the id 0
        # as "no match".
        annotations = [{**x, "id": i} for i, x in enumerate(self._truth["annotations"], 1)]
        truth.dataset = {**self._truth, "annotations": annotations}
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return {kind: self._average_precision(truth, instances, kind) for kind in ("bbox", "segm")}

    def _evaluated_instances(self) -> list[dict[str, Any]]:
        """Return the annotations of the images that are evaluated, without crowds."""
        of_part = None if self._image_ids is None else set(self._image_ids)
        annotations = self._truth["annotations"]
        return [x for x in annotations if not x["iscrowd"] and (of_part is None or x["image_id"] in of_part)]

    def _average_precision(self, truth: COCO, instances: list[dict[str, Any]], kind: str) -> dict[str, float]:
        """Return the AP metrics of ``kind``, "bbox" or "segm", in percent."""
        left_out = "bbox" if kind == "segm" else None  # COCO would take the area of a mask from its box
        with contextlib.redirect_stdout(io.StringIO()):
            detections = truth.loadRes([{k: v for k, v in x.items() if k != left_out} for x in instances])
        evaluation = COCOeval_opt(truth, detections, kind)
        if self._image_ids is not None:
            evaluation.params.imgIds = self._image_ids
        most = max(Counter(x["image_id"] for x in self._evaluated_instances()).values(), default=0)
        beyond = min(most, self._max_detections) > _MAX_DETECTIONS
        if beyond:
            evaluation.params.maxDets = [*evaluation.params.maxDets, self._max_detections]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        logger.debug("COCO's evaluation of %s:\n%s", kind, printed.getvalue().rstrip())
        percent = [100 * float(x) if x >= 0 else float("nan") for x in evaluation.stats]
        metrics = dict(zip(_METRICS, percent, strict=False))
        logger.info("Evaluation results of %s:\n%s", kind, create_small_table(metrics))
        precisions = evaluation.eval["precision"][:, :, :, 0]  # [IoU thresholds, recalls, classes, maximums]
        if beyond:
            metrics[f"AP@{self._max_detections}"] = _mean(precisions[..., -1])
            logger.info(
                "An image has %d instances, but COCO's AP counts only %d detections per image. With %d detections per "
                "image (TEST.DETECTIONS_PER_IMAGE), the AP of %s is %.3f.",
                *(most, _MAX_DETECTIONS, self._max_detections, kind, _mean(precisions[..., -1])),
            )
        if kind == "segm":
            self._add_section(evaluation)
            metrics["masks_per_object"] = masks_per_object(evaluation)
            logger.info("Masks per object that was found: %.3f (1 is best).", metrics["masks_per_object"])
        if len(self._names) > 1:
            precision = precisions[..., 2]
            of_class = {f"AP-{name}": _mean(precision[..., i]) for i, name in enumerate(self._names)}
            logger.info("AP of %s per class: %s", kind, ", ".join(f"{k[3:]} {v:.1f}" for k, v in of_class.items()))
            metrics.update(of_class)
        return metrics

    def _add_section(self, evaluation: COCOeval_opt | None) -> None:
        """Make the section of the report; ``evaluation`` is None if there is no detection."""
        if not self._report:
            return
        if evaluation is None:
            ids = {x["id"] for x in self._truth["images"]} if self._image_ids is None else set(self._image_ids)
            self.sections = [
                instance_section(
                    self._names, sorted(self._category_ids), sorted(ids), self._truth["annotations"], [], {}, None, 0
                )
            ]
            return
        self.sections = [
            instance_section(
                self._names,
                evaluation.params.catIds,
                evaluation.params.imgIds,
                evaluation.cocoGt.dataset["annotations"],
                evaluation.cocoDt.dataset["annotations"],
                evaluation.ious,
                evaluation.eval["precision"][:, :, :, 0, 2],
                _MAX_DETECTIONS,
            )
        ]


def masks_per_object(evaluation: COCOeval_opt) -> float:
    """Mean number of masks on an object that was found; above 1, several kernels segment the same object.

    The masks of an object are those of its class with an IoU above 0.7 and at least half the score of the best of them.

    Args:
        evaluation: after evaluate().
    """
    counts = []
    for (image_id, category_id), ious in evaluation.ious.items():
        if not len(ious):
            continue
        found, truth = (
            coco.loadAnns(coco.getAnnIds(imgIds=[image_id], catIds=[category_id]))
            for coco in (evaluation.cocoDt, evaluation.cocoGt)
        )
        scores = np.sort([x["score"] for x in found])[::-1][: len(ious)]  # in the order of COCO's IoUs
        for iou, x in zip(np.asarray(ious).T, truth, strict=True):
            own = scores[iou > _SAME_OBJECT]
            if len(own) and not x["iscrowd"]:
                counts.append((own >= own[0] / 2).sum())
    return float(np.mean(counts)) if counts else float("nan")


def _ground_truth_of_records(name: str) -> dict[str, Any]:
    """Convert the records of a data set to COCO's format."""
    try:
        return convert_to_coco_dict(name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"The records of data set {name} can't be evaluated ({type(error).__name__}: {error}). Give each record "
            "height, width and image_id, and each annotation bbox, bbox_mode, category_id and segmentation (polygons "
            "or RLE)."
        ) from error


def _mean(precision: np.ndarray) -> float:
    """Return the mean precision in percent, without the entries -1, which COCO could not compute; NaN if all are."""
    return 100 * float(precision[precision > -1].mean()) if (precision > -1).any() else float("nan")
