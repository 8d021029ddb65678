"""Panoptic quality, counted by panopticapi, for any categories."""

import contextlib
import copy
import io
import json
import logging
import os
import shutil
import tempfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from panopticapi.evaluation import PQStat, pq_compute_single_core
from panopticapi.utils import id2rgb
from PIL import Image
from tabulate import tabulate

from ..data.coco_json import read_coco_json
from ..data.files import read_panoptic, segment_index
from ..errors import DataError

logger = logging.getLogger(__name__)

# All, things, stuff: suffix of the result's keys, and value of "isthing".
_PARTS = (("", None), ("_th", True), ("_st", False))


class PanopticEvaluator(DatasetEvaluator):
    """panopticapi's counts, with the same result keys as Detectron2's evaluator, but

    - it works with any categories: where a data set has no things or no stuff, their quality is NaN;
    - predictions lie on the disk until they are compared, and each process compares its own, in threads;
    - images without ground truth (a JSON without "annotations") give files to submit, as Detectron2 does for instances;
    - images may have the same file name in different folders.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: as registered.
            output_dir: where predictions are written; None: nowhere.
        """
        self._metadata = MetadataCatalog.get(dataset_name)
        self._dataset_ids = {  # contiguous -> the JSON's, by isthing
            isthing: {v: k for k, v in self._metadata.get(f"{kind}_dataset_id_to_contiguous_id").items()}
            for kind, isthing in (("thing", True), ("stuff", False))
        }
        self._output_dir = output_dir
        if output_dir:
            os.makedirs(output_dir, exist_ok=True)

    def reset(self) -> None:
        self._predictions: list[dict[str, Any]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="panoptic_eval")

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: with "image_id".
            outputs: with "panoptic_seg": segment ids [H, W], 0 where there is none, and a dict of each segment with
                "id", "isthing" and "category_id".
        """
        for image, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            file_name = f"{len(self._predictions)}.png"
            Image.fromarray(id2rgb(ids.cpu().numpy())).save(os.path.join(self._folder.name, file_name))
            info = [{**x, "category_id": self._dataset_ids[x["isthing"]][x["category_id"]]} for x in segments]
            for segment in info:
                del segment["isthing"]
            prediction = {"image_id": image["image_id"], "file_name": file_name, "segments_info": info}
            self._predictions.append(prediction)

    def evaluate(self) -> "OrderedDict[str, dict[str, float]] | None":
        """Returns {"panoptic_seg": {"PQ", "SQ", "RQ", "PQ_th", ..., "RQ_st"}} in percent, on the main process."""
        ground_truth = self._read_ground_truth()
        if "annotations" not in ground_truth:
            self._write_submission(ground_truth)
            return None
        annotations = {annotation["image_id"]: annotation for annotation in ground_truth["annotations"]}
        categories = {category["id"]: category for category in ground_truth["categories"]}
        statistics = self._compare(annotations, categories)
        comm.synchronize()
        gathered = comm.gather((statistics, self._predictions))
        self._folder.cleanup()
        if not comm.is_main_process():
            return None
        statistics, predictions = PQStat(), []
        for part, part_predictions in gathered:
            for of_image in part:  # one by one, so that the sums are the same for any number of processes
                statistics += of_image
            predictions += part_predictions
        missing = sorted(set(annotations) - {x["image_id"] for x in predictions}, key=str)
        if missing:
            raise DataError(
                f"{self._metadata.panoptic_json} has {len(missing)} images without a prediction, as {missing[0]}."
            )
        if self._output_dir:
            with PathManager.open(os.path.join(self._output_dir, "predictions.json"), "w") as f:
                json.dump({**ground_truth, "annotations": predictions}, f)
        return OrderedDict(panoptic_seg=_summary(statistics, categories))

    def _read_ground_truth(self) -> dict[str, Any]:
        ground_truth = read_coco_json(self._metadata.panoptic_json)
        if "annotations" not in ground_truth:
            return ground_truth
        images = self._metadata.get("image_ids")  # of a data set that is a part of the JSON's images
        of_part = None if images is None else set(images)
        annotations = [
            {**x, "segments_info": [{"iscrowd": 0, **segment} for segment in x["segments_info"]]}
            for x in ground_truth["annotations"]
            if of_part is None or x["image_id"] in of_part
        ]
        return {**ground_truth, "annotations": annotations}

    def _write_submission(self, image_info: dict[str, Any]) -> None:
        """Predictions for images without ground truth in COCO's result format: a JSON and a folder of PNGs."""
        if not self._output_dir:
            return
        folder = os.path.join(self._output_dir, "predictions")
        os.makedirs(folder, exist_ok=True)
        names = {x["id"]: os.path.splitext(x["file_name"])[0].replace("/", "_") + ".png" for x in image_info["images"]}
        for prediction in self._predictions:
            name = names[prediction["image_id"]]
            shutil.copyfile(os.path.join(self._folder.name, prediction["file_name"]), os.path.join(folder, name))
            prediction["file_name"] = name
        self._folder.cleanup()
        gathered = comm.gather(self._predictions)
        if comm.is_main_process():
            path = os.path.join(self._output_dir, "predictions.json")
            with PathManager.open(path, "w") as f:
                json.dump({"annotations": [x for part in gathered for x in part]}, f)
            logger.info("No annotations in %s: wrote %s and %s", self._metadata.panoptic_json, path, folder)

    def _compare(self, annotations: dict[Any, dict], categories: dict[int, dict]) -> list[PQStat]:
        """Counts per category of each of this process's images."""
        folder = PathManager.get_local_path(self._metadata.panoptic_root)

        def compare(prediction: dict[str, Any]) -> PQStat:
            try:
                # panopticapi writes areas into the segments it is given.
                pair = (_with_areas(annotations[prediction["image_id"]], folder), copy.deepcopy(prediction))
                return pq_compute_single_core(0, [pair], folder, self._folder.name, categories)
            except (KeyError, IndexError, TypeError, OSError, ValueError) as error:
                _check_png(annotations[prediction["image_id"]], folder, prediction, self._folder.name)
                raise DataError(
                    f"The panoptic ground truth of image {prediction['image_id']} in {self._metadata.panoptic_json} "
                    f"and {folder} can't be compared with the prediction: {error}."
                ) from error

        silence = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with silence[0], silence[1], ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(compare, self._predictions))


def _check_png(annotation: dict[str, Any], folder: str, prediction: dict[str, Any], prediction_folder: str) -> None:
    """Raise the DataError of a ground-truth PNG that is missing, damaged or not of the prediction's size."""
    size = read_panoptic(os.path.join(prediction_folder, prediction["file_name"])).shape[:2]
    read_panoptic(os.path.join(folder, annotation["file_name"]), f"{prediction['image_id']} (image_id)", size)


def _with_areas(annotation: dict[str, Any], folder: str) -> dict[str, Any]:
    """The ground truth of an image with the areas of its segments, which some programs don't write."""
    segments = annotation["segments_info"]
    if all("area" in segment for segment in segments):
        return annotation
    index = segment_index(read_panoptic(os.path.join(folder, annotation["file_name"])), [x["id"] for x in segments])
    areas = np.bincount(index.reshape(-1), minlength=len(segments)).tolist()
    return {**annotation, "segments_info": [{**x, "area": area} for x, area in zip(segments, areas, strict=False)]}


def _summary(statistics: PQStat, categories: dict[int, dict]) -> dict[str, float]:
    results, rows = {}, []
    for suffix, isthing in _PARTS:
        quality = _average(statistics, categories, isthing)
        row = {key.upper() + suffix: 100 * float(quality[key]) for key in ("pq", "sq", "rq")}
        results.update(row)
        title = {None: "All", True: "Things", False: "Stuff"}[isthing]
        rows.append([title, *row.values(), quality["n"]])
    table = tabulate(rows, headers=["", "PQ", "SQ", "RQ", "#categories"], tablefmt="pipe", floatfmt=".3f")
    logger.info("Panoptic evaluation results:\n%s", table)
    return results


def _average(statistics: PQStat, categories: dict[int, dict], isthing: bool | None) -> dict[str, float]:
    """panopticapi's average over the categories; NaN where none occurs, for which panopticapi divides by zero."""
    try:
        return statistics.pq_average(categories, isthing)[0]
    except ZeroDivisionError:
        return {"pq": float("nan"), "sq": float("nan"), "rq": float("nan"), "n": 0}
