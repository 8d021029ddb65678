"""Evaluates panoptic segmentation by panoptic quality (PQ), computed by panopticapi, for any categories."""

import contextlib
import copy
import io
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
from panopticapi.utils import id2rgb, rgb2id
from PIL import Image
from tabulate import tabulate

from ..data.class_coverage import warn_of_absent_classes
from ..data.coco_json import read_coco_json
from ..data.files import read_panoptic, write_json
from ..data.segmentation import segment_index
from ..errors import DataError
from .report.matches import Matches, panoptic_matches
from .report.panoptic import panoptic_section
from .report.section import Section

logger = logging.getLogger(__name__)

# (suffix of the result keys, value of "isthing") for all categories, things and stuff.
_PARTS = (("", None), ("_th", True), ("_st", False))


class PanopticEvaluator(DatasetEvaluator):
    """Computes panoptic quality.

    The result keys are the same as those of Detectron2's evaluator. The differences are:

    - all categories are supported; if a data set has no things or no stuff, their metrics are NaN;
    - predictions are kept on disk, and each process compares its own predictions with the ground truth, in threads;
    - for images without ground truth (a JSON without "annotations"), files for a submission are written;
    - images in different folders may have the same file name.

    Attributes:
        sections: what the report shows, after evaluate() on the main process; empty if there is nothing to show.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, report: bool = False) -> None:
        """
        Args:
            dataset_name: name of the data set.
            output_dir: folder for the predictions; None: they are not written.
            report: whether ``sections`` are made.
        """
        self._metadata = MetadataCatalog.get(dataset_name)
        self._dataset_ids = {  # isthing -> contiguous id -> category id of the JSON
            isthing: {v: k for k, v in self._metadata.get(f"{kind}_dataset_id_to_contiguous_id").items()}
            for kind, isthing in (("thing", True), ("stuff", False))
        }
        self._output_dir = output_dir
        self._report = report
        self.sections: list[Section] = []
        if output_dir:
            os.makedirs(output_dir, exist_ok=True)

    def reset(self) -> None:
        self._predictions: list[dict[str, Any]] = []
        self.sections = []
        self._folder = tempfile.TemporaryDirectory(prefix="panoptic_eval")

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with "image_id".
            outputs: dicts with "panoptic_seg": segment ids [H, W] (0 for pixels without a segment), and one dict per
                segment with "id", "isthing" and "category_id".
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
        """Return {"panoptic_seg": {"PQ", "SQ", "RQ", "PQ_th", ..., "RQ_st"}} in percent, on the main process.

        The result is None on other processes, and for images without ground truth.
        """
        ground_truth = self._read_ground_truth()
        if "annotations" not in ground_truth:
            self._write_submission(ground_truth)
            return None
        annotations = {annotation["image_id"]: annotation for annotation in ground_truth["annotations"]}
        categories = {category["id"]: category for category in ground_truth["categories"]}
        compared = self._compare(annotations, categories)
        comm.synchronize()
        gathered = comm.gather((compared, self._predictions))
        self._folder.cleanup()
        if not comm.is_main_process():
            return None
        statistics, matches, predictions = PQStat(), {}, []
        for part, part_predictions in gathered:
            for prediction, (of_image, of_report) in zip(
                part_predictions, part, strict=True
            ):  # add image by image: sums are then equal for any number of processes
                statistics += of_image
                matches[prediction["image_id"]] = of_report
            predictions += part_predictions
        missing = sorted(set(annotations) - {x["image_id"] for x in predictions}, key=str)
        if missing:
            raise DataError(
                f"{self._metadata.panoptic_json}: {len(missing)} images have no prediction; the first has the id "
                f"{missing[0]}. Evaluate all images of the data set."
            )
        if self._output_dir:
            content = {**ground_truth, "annotations": predictions}
            write_json(os.path.join(self._output_dir, "predictions.json"), content)
        segments = [segment for x in annotations.values() for segment in x["segments_info"]]
        there = {segment["category_id"] for segment in segments if not segment["iscrowd"]}
        occurring = [n for n, category in enumerate(categories) if category in there]
        names = [category["name"] for category in categories.values()]
        warn_of_absent_classes(self._metadata.name, "segment", names, occurring)
        if self._report and matches:
            things = [bool(category["isthing"]) for category in categories.values()]
            self.sections = [panoptic_section(names, things, matches)]
        return OrderedDict(panoptic_seg=_summary(statistics, categories))

    def _read_ground_truth(self) -> dict[str, Any]:
        ground_truth = read_coco_json(self._metadata.panoptic_json, self._metadata.get("image_root"))
        if "annotations" not in ground_truth:
            return ground_truth
        images = self._metadata.get("image_ids")  # set if the data set is a part of the JSON's images
        of_part = None if images is None else set(images)
        annotations = [
            {**x, "segments_info": [{"iscrowd": 0, **segment} for segment in x["segments_info"]]}
            for x in ground_truth["annotations"]
            if of_part is None or x["image_id"] in of_part
        ]
        return {**ground_truth, "annotations": annotations}

    def _write_submission(self, image_info: dict[str, Any]) -> None:
        """Write the predictions in COCO's result format: a JSON and a folder of PNGs."""
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
            write_json(path, {"annotations": [x for part in gathered for x in part]})
            logger.info("%s has no annotations: wrote %s and %s.", self._metadata.panoptic_json, path, folder)

    def _compare(
        self, annotations: dict[Any, dict], categories: dict[int, dict]
    ) -> list[tuple[PQStat, Matches | None]]:
        """Compare this process's predictions with the ground truth.

        Returns:
            The counts of each image, and its matched segments for the report.
        """
        folder = PathManager.get_local_path(self._metadata.panoptic_root)

        labels = {category: i for i, category in enumerate(categories)}

        def compare(prediction: dict[str, Any]) -> tuple[PQStat, Matches | None]:
            try:
                # Copy the prediction, because panopticapi writes areas into its segments.
                pair = (_with_areas(annotations[prediction["image_id"]], folder), copy.deepcopy(prediction))
                counts = pq_compute_single_core(0, [pair], folder, self._folder.name, categories)
                return counts, self._match(pair[0], folder, prediction, labels) if self._report else None
            except (KeyError, IndexError, TypeError, OSError, ValueError) as error:
                _check_png(annotations[prediction["image_id"]], folder, prediction, self._folder.name)
                raise DataError(
                    f"{self._metadata.panoptic_json}: the ground truth of image {prediction['image_id']} can't be "
                    f"compared with the prediction ({error}). Check its annotation, and its PNG in {folder}."
                ) from error

        silence = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with silence[0], silence[1], ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(compare, self._predictions))

    def _match(
        self, annotation: dict[str, Any], folder: str, prediction: dict[str, Any], labels: dict[int, int]
    ) -> Matches:
        truth, predicted = (
            rgb2id(read_panoptic(os.path.join(place, x["file_name"])))
            for place, x in ((folder, annotation), (self._folder.name, prediction))
        )
        return panoptic_matches(truth, annotation["segments_info"], predicted, prediction["segments_info"], labels)


def _check_png(annotation: dict[str, Any], folder: str, prediction: dict[str, Any], prediction_folder: str) -> None:
    """Raise a DataError if a ground-truth PNG is missing, damaged, or has another size than the prediction."""
    size = read_panoptic(os.path.join(prediction_folder, prediction["file_name"])).shape[:2]
    read_panoptic(os.path.join(folder, annotation["file_name"]), f"{prediction['image_id']} (image_id)", size)


def _with_areas(annotation: dict[str, Any], folder: str) -> dict[str, Any]:
    """Add the areas of the segments to the ground truth of an image, because some programs do not write them."""
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
    """Return panopticapi's average over the categories; NaN if none occurs, because panopticapi then divides by 0."""
    try:
        return statistics.pq_average(categories, isthing)[0]
    except ZeroDivisionError:
        return {"pq": float("nan"), "sq": float("nan"), "rq": float("nan"), "n": 0}
