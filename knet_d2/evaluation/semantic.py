"""Intersection over union of semantic segmentation."""

import logging
from typing import Any

import numpy as np
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils.logger import create_small_table

from ..data import load_dataset
from ..data.mapper import read_sem_seg
from ..errors import DataError

logger = logging.getLogger(__name__)


class SemanticEvaluator(SemSegEvaluator):
    """Detectron2's evaluator; ground truth is read as in training: with its label map, and checked.

    mIoU is the mean over all classes that are in the ground truth or predicted, as in Detectron2 0.6 and in
    MMSegmentation, with which K-Net's published figures were made: a class that is predicted but nowhere in the
    ground truth counts as 0. Detectron2's main branch leaves such a class out, which can only raise the figure; here
    both give the same. Its boundary metrics are switched off, for the same results everywhere.
    """

    def __init__(self, dataset_name: str, *, class_ids: list[int], output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: as registered.
            class_ids: the label that the data set gives each class of the model.
            output_dir: where predictions and results are written; None: nowhere.
        """
        super().__init__(dataset_name, output_dir=output_dir)
        self._compute_boundary_iou = False
        # What it would log are its own figures, before mIoU is replaced.
        self._logger = logging.Logger(__name__, level=logging.WARNING)
        self._records = {record["file_name"]: record for record in load_dataset(dataset_name)}
        self._class_ids = np.asarray(class_ids, np.int64)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: with "file_name".
            outputs: with "sem_seg": scores [K, H, W] of the K classes of the model.
        """
        size = self._num_classes + 1
        for image, output in zip(inputs, outputs, strict=True):
            predicted = self._class_ids[output["sem_seg"].argmax(dim=0).cpu().numpy()]
            labels = read_sem_seg(
                self._records[image["file_name"]], predicted.shape, self._num_classes, self._ignore_label
            )
            labels = np.where(labels == self._ignore_label, self._num_classes, labels)
            pairs = np.bincount((size * predicted + labels).reshape(-1), minlength=size**2)
            self._conf_matrix += pairs.reshape(size, size)
            if self._output_dir:
                self._predictions.extend(self.encode_json_sem_seg(predicted, image["file_name"]))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns {"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC", "IoU-<class>", "ACC-<class>"}} in percent."""
        results = super().evaluate()
        if results is None:
            return None
        confusion = self._conf_matrix[:-1, :-1]
        if not confusion.any():
            raise DataError(
                f"Data set {self._dataset_name} has no labelled pixel to evaluate on. Check its ignored labels."
            )
        metrics = {key: float(value) for key, value in results["sem_seg"].items()}
        metrics["mIoU"] = 100 * mean_iou(confusion)
        overall = {key: metrics[key] for key in ("mIoU", "fwIoU", "mACC", "pACC")}
        per_class = ", ".join(f"{name} {metrics['IoU-' + name]:.1f}" for name in self._class_names)
        logger.info("Semantic evaluation results:\n%s\nIoU of each class: %s", create_small_table(overall), per_class)
        return {"sem_seg": metrics}


def mean_iou(confusion: np.ndarray) -> float:
    """Mean over the classes that occur: confusion [K, K] counts pixels by predicted (row) and true class (column)."""
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()
    return float(np.mean(confusion.diagonal()[union > 0] / union[union > 0]))
