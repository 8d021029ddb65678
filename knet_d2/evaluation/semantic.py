"""Evaluates semantic segmentation by intersection over union (IoU)."""

import logging
import os
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from ..data import load_dataset
from ..data.class_coverage import warn_of_absent_classes
from ..data.classes import class_table
from ..data.files import write_json
from ..data.mapper import build_truth_mapper, read_sem_seg
from ..data.segmentation import encode_mask
from ..errors import DataError
from .report.section import Section
from .report.semantic import PixelCounts, semantic_section

logger = logging.getLogger(__name__)


class SemanticEvaluator(DatasetEvaluator):
    """Computes IoU and accuracy.

    The result keys and files are the same as those of Detectron2's evaluator. The ground truth is read as in training:
    with the label map of the data set, and checked.

    mIoU is the mean over all classes that occur in the ground truth or in the predictions, as in Detectron2 0.6 and in
    MMSegmentation, which computed the published metrics of K-Net. A class that occurs only in predictions counts as
    0. Detectron2's main branch leaves such a class out, which can only raise mIoU.

    Attributes:
        sections: what the report shows, after evaluate() on the main process; empty if there is nothing to show.
    """

    def __init__(
        self, dataset_name: str, *, class_ids: list[int], output_dir: str | None = None, report: bool = False
    ) -> None:
        """
        Args:
            dataset_name: name of the data set.
            class_ids: label in the data set of each class of the model.
            output_dir: folder for the predictions and metrics; None: they are not written.
            report: whether ``sections`` are made.
        """
        self._dataset_name = dataset_name
        self._records = {record["file_name"]: record for record in load_dataset(dataset_name)}
        self._metadata = MetadataCatalog.get(dataset_name)
        self._class_ids = np.asarray(class_ids, np.int64)
        self._output_dir = output_dir
        self._report = report
        self.sections: list[Section] = []

    @property
    def _names(self) -> list[str]:
        """The classes of the ground truth."""
        return self._metadata.stuff_classes

    @property
    def _dataset_ids(self) -> dict[int, int]:
        """Class -> id in the data set's own files, where that is another number."""
        return {v: k for k, v in (self._metadata.get("stuff_dataset_id_to_contiguous_id") or {}).items()}

    def _read(self, record: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        """The ground truth: int64 [H, W], the number of classes where a pixel is ignored."""
        number, ignored = len(self._names), self._metadata.get("ignore_label", 255)
        labels = read_sem_seg(record, size, number, ignored)
        return np.where(labels == ignored, number, labels)

    def reset(self) -> None:
        size = len(self._names) + 1  # the last row and column count ignored pixels
        self._confusion = np.zeros((size, size), np.int64)
        self._predictions: list[dict[str, Any]] = []
        self._counts: dict[str, PixelCounts] = {}
        self.sections = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with "file_name".
            outputs: dicts with "sem_seg": scores [K, H, W] of the K classes of the model, or label maps [H, W].
        """
        size = len(self._confusion)
        for image, output in zip(inputs, outputs, strict=True):
            scores = output["sem_seg"]
            predicted = self._class_ids[(scores if scores.dim() == 2 else scores.argmax(dim=0)).cpu().numpy()]
            labels = self._read(self._records[image["file_name"]], predicted.shape)
            pairs = np.bincount((size * predicted + labels).reshape(-1), minlength=size**2).reshape(size, size)
            self._confusion += pairs
            if self._report:
                self._counts[image["file_name"]] = PixelCounts.of(pairs[:-1, :-1])
            if self._output_dir:
                self._predictions += self._encode(predicted, image["file_name"])

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return {"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC", "IoU-<class>", "ACC-<class>"}} in percent.

        The result is None except on the main process.

        Raises:
            DataError: the ground truth has no labelled pixel.
        """
        comm.synchronize()
        gathered = comm.gather((self._confusion, self._predictions, self._counts))
        if not comm.is_main_process():
            return None
        confusion = sum(part[0] for part in gathered)[:-1, :-1]
        if not confusion.any():
            raise DataError(f"Data set {self._dataset_name} has no labelled pixel. Check the labels that it ignores.")
        right, of_class = confusion.diagonal(), confusion.sum(axis=0)
        there = of_class > 0
        names = self._names
        warn_of_absent_classes(self._dataset_name, "pixel", names, there.nonzero()[0].tolist())
        accuracy, iou = np.full((2, len(confusion)), np.nan)
        accuracy[there] = right[there] / of_class[there]
        iou[there] = right[there] / (of_class + confusion.sum(axis=1) - right)[there]
        overall = {
            "mIoU": mean_iou(confusion),
            "fwIoU": np.sum(iou[there] * of_class[there]) / of_class.sum(),
            "mACC": accuracy[there].mean(),
            "pACC": right.sum() / of_class.sum(),
        }
        each = {f"{key}-{name}": x for key, of in (("IoU", iou), ("ACC", accuracy)) for name, x in zip(names, of)}
        metrics = {key: 100 * float(value) for key, value in {**overall, **each}.items()}
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            torch.save(metrics, os.path.join(self._output_dir, "sem_seg_evaluation.pth"))
            segments = [x for part in gathered for x in part[1]]
            write_json(os.path.join(self._output_dir, "sem_seg_predictions.json"), segments)
        table = create_small_table({key: metrics[key] for key in overall})
        per_class = ", ".join(f"{name} {metrics['IoU-' + name]:.1f}" for name in names)
        logger.info("Semantic evaluation results:\n%s\nIoU per class: %s", table, per_class)
        if self._report:
            images = {name: counts for part in gathered for name, counts in part[2].items()}
            self.sections = [semantic_section(names, confusion, images)]
        return {"sem_seg": metrics}

    def _encode(self, predicted: np.ndarray, file_name: str) -> list[dict[str, Any]]:
        """Encode the predicted classes of one image in COCO's result format for stuff."""
        results, dataset_ids = [], self._dataset_ids
        for label in np.unique(predicted).tolist():
            category, segmentation = dataset_ids.get(label, label), encode_mask(predicted == label)
            results.append({"file_name": file_name, "category_id": category, "segmentation": segmentation})
        return results


class SegmentClassEvaluator(SemanticEvaluator):
    """The same for data sets without label maps, where a pixel has the class of its panoptic segment."""

    def __init__(self, cfg: CfgNode, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            cfg: the config, with its classes resolved.
            dataset_name, output_dir: see :class:`SemanticEvaluator`.
        """
        self._classes = class_table(cfg)
        class_ids = list(range(len(self._classes.names)))
        super().__init__(dataset_name, class_ids=class_ids, output_dir=output_dir, report=cfg.TEST.REPORT)
        self._mapper = build_truth_mapper(cfg, [])

    @property
    def _names(self) -> list[str]:
        return self._classes.names

    @property
    def _dataset_ids(self) -> dict[int, int]:
        return dict(enumerate(self._classes.file_ids))

    def _read(self, record: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        return np.minimum(self._mapper.labels(record, size).astype(np.int64), len(self._names))


def mean_iou(confusion: np.ndarray) -> float:
    """Return the mean IoU over the classes that occur, 0 to 1.

    Args:
        confusion: number of pixels by predicted class (row) and true class (column), [K, K].
    """
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()
    return float(np.mean(confusion.diagonal()[union > 0] / union[union > 0]))
