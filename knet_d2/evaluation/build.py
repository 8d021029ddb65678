"""Selects the evaluators of a data set by its evaluator_type and the outputs of the model."""

import contextlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
)
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..data import load_dataset
from ..data.class_coverage import warn_of_absent_classes_in
from ..data.classes import loaded_metadata
from ..errors import ConfigError, KNetError
from ..setup.compat import replaced
from ..tasks import get_task
from ..video.evaluators import VideoInstanceEvaluator, VideoPanopticEvaluator
from .instance import InstanceEvaluator
from .panoptic import PanopticEvaluator
from .report import Section
from .semantic import SegmentClassEvaluator, SemanticEvaluator

logger = logging.getLogger(__name__)

# TEST.DETECTIONS_PER_IMAGE is of one tile
_MOST_OF_TILES = 10_000
# Types of data sets whose evaluators take the results of tiles
_TILED = ("coco", "coco_panoptic_seg", "cityscapes_panoptic_seg", "sem_seg")

Builder = Callable[[CfgNode, str, "str | None"], DatasetEvaluator]


def _instance(cfg: CfgNode, name: str, folder: str | None) -> DatasetEvaluator:
    most = _MOST_OF_TILES if cfg.TEST.TILES.SIZE else cfg.TEST.DETECTIONS_PER_IMAGE
    return InstanceEvaluator(name, folder, most, report=cfg.TEST.REPORT)


def _panoptic(cfg: CfgNode, name: str, folder: str | None) -> DatasetEvaluator:
    return PanopticEvaluator(name, folder, report=cfg.TEST.REPORT)


def _semantic(cfg: CfgNode, name: str, folder: str | None) -> DatasetEvaluator:
    knet = cfg.MODEL.KNET
    if not loaded_metadata(name).get("sem_seg_root") and loaded_metadata(name).get("panoptic_json"):
        return SegmentClassEvaluator(cfg, name, folder)
    # Some label maps mark all things with one class "things", which has the label 0.
    separated = knet.NUM_THING_CLASSES and "things" in loaded_metadata(name).stuff_classes[:1]
    things = [0] * knet.NUM_THING_CLASSES if separated else knet.THING_CATEGORY_IDS
    class_ids = [*things, *knet.STUFF_CATEGORY_IDS]
    return SemanticEvaluator(name, class_ids=class_ids, output_dir=folder, report=cfg.TEST.REPORT)


def _video_panoptic(cfg: CfgNode, name: str, folder: str | None) -> DatasetEvaluator:
    return DatasetEvaluators([VideoPanopticEvaluator(name), VideoInstanceEvaluator(name, "panoptic_seg")])


def _video_instance(cfg: CfgNode, name: str, folder: str | None) -> DatasetEvaluator:
    return VideoInstanceEvaluator(name, "instances")


class Evaluators(DatasetEvaluators):
    """All evaluators of a data set."""

    def __init__(self, evaluators: list[DatasetEvaluator]) -> None:
        super().__init__(evaluators)
        self._parts = evaluators

    @property
    def sections(self) -> list[Section]:
        """What the report shows, after evaluate() on the main process."""
        return [section for part in self._parts for section in getattr(part, "sections", ())]


class _ByPackage(DatasetEvaluator):
    """Detectron2's evaluators that need a package which is installed on demand.

    The packages get the names that NumPy removed: np.float for lvis 0.5, np.in1d for cityscapesscripts 2.
    """

    package: str

    def __init__(self, dataset_name: str, **options: Any) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise ConfigError(
                f"DATASETS.TEST: data set {dataset_name} is evaluated by the package {self.package}. Install it: "
                f"python -m pip install {self.package}."
            )
        super().__init__(dataset_name, **options)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        with replaced(np, float=float, in1d=np.isin):
            return super().evaluate()


class _CityscapesInstanceEvaluator(_ByPackage, CityscapesInstanceEvaluator):
    """Detectron2's evaluator, without matches.json.

    cityscapesscripts writes this file into the working directory, and fails at it since NumPy 2.4.
    """

    package = "cityscapesscripts"

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as program

        with replaced(program, writeDict2JSON=lambda *_: None):
            return super().evaluate()


class _CityscapesSemanticEvaluator(_ByPackage, CityscapesSemSegEvaluator):
    """Detectron2's evaluator, with its mean over the classes, "IoU", also under the usual name "mIoU"."""

    package = "cityscapesscripts"

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        results = super().evaluate()
        return results and {"sem_seg": {"mIoU": results["sem_seg"]["IoU"], **results["sem_seg"]}}


class _LVISEvaluator(_ByPackage, LVISEvaluator):
    package = "lvis"


# evaluator_type -> output of the model -> (metadata keys, one of which the evaluator needs; builder).
_PANOPTIC: dict[str, tuple[tuple[str, ...], Builder]] = {
    "panoptic_seg": (("panoptic_json",), _panoptic),
    "instances": (("json_file",), _instance),
    "sem_seg": (("sem_seg_root", "panoptic_json"), _semantic),
}
EVALUATORS: dict[str, dict[str, tuple[tuple[str, ...], Builder]]] = {
    "coco": {"instances": (("thing_classes",), _instance)},
    "coco_panoptic_seg": _PANOPTIC,
    "cityscapes_panoptic_seg": _PANOPTIC,
    "sem_seg": {"sem_seg": (("stuff_classes",), _semantic)},
    "lvis": {"instances": (("json_file",), lambda cfg, name, folder: _LVISEvaluator(name, output_dir=folder))},
    "cityscapes_instance": {"instances": (("gt_dir",), lambda cfg, name, folder: _CityscapesInstanceEvaluator(name))},
    "video_panoptic": {
        "panoptic_seg": (("stuff_classes",), _video_panoptic),
        "instances": (("thing_classes",), _video_instance),
    },
    "video_instance": {"instances": (("thing_classes",), _video_instance)},
    "cityscapes_sem_seg": {"sem_seg": (("gt_dir",), lambda cfg, name, folder: _CityscapesSemanticEvaluator(name))},
}


# Evaluators that warn of classes which do not occur in what they evaluate; the ground truth of others is searched for
# them.
_KNOW_ABSENT_CLASSES = (InstanceEvaluator, PanopticEvaluator, SemanticEvaluator)
# (data set, task) that were searched; reading LVIS or Cityscapes takes too long for each evaluation of a training run
_searched: set[tuple[str, str]] = set()

# Output of the model -> metric by which model_best.pth is chosen
_BEST_METRICS = {"panoptic_seg": "panoptic_seg/PQ", "instances": "segm/AP", "sem_seg": "sem_seg/mIoU"}

_BEST_VIDEO_METRICS = {"panoptic_seg": "video_panoptic/STQ", "instances": "video_instance/AP"}


def build_evaluators(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> list[DatasetEvaluator]:
    """Build the evaluators of a data set for the outputs of a config's model.

    Classes of the model that do not occur in the data set are told by a warning, here or at the end of the evaluation.

    Args:
        cfg: the config, with its classes resolved.
        dataset_name: name of the data set.
        output_folder: folder for the predictions; None: they are not written.

    Raises:
        ConfigError: no evaluator fits the data set and the outputs of the model.
    """
    if dataset_name not in DatasetCatalog:
        load_dataset(dataset_name, "DATASETS.TEST")  # raises an error that suggests similar names
    metadata = loaded_metadata(dataset_name)
    kind = metadata.get("evaluator_type") or _kind_of_records(dataset_name)
    outputs = get_task(cfg).checked_outputs(cfg.MODEL.KNET.TEST.OUTPUTS)
    if kind not in EVALUATORS:
        raise ConfigError(
            f"DATASETS.TEST: data set {dataset_name} has evaluator_type {kind!r} in its metadata; use one of "
            f"{', '.join(EVALUATORS)}."
        )
    if cfg.TEST.TILES.SIZE and kind not in _TILED:
        raise ConfigError(
            f"TEST.TILES.SIZE = {cfg.TEST.TILES.SIZE}: data set {dataset_name} with evaluator_type {kind!r} can't be "
            f"evaluated in tiles, only {', '.join(_TILED)}. Set it to 0."
        )
    if any(not PathManager.isfile(metadata.get(key)) for key in ("json_file", "panoptic_json") if metadata.get(key)):
        load_dataset(dataset_name, "DATASETS.TEST")  # generates the files, or raises an error that names the file
    evaluators = []
    for output in outputs:
        keys, builder = EVALUATORS[kind].get(output, ((), None))
        if builder is not None and any(metadata.get(key) for key in keys):
            evaluators.append(builder(cfg, dataset_name, output_folder))
        else:
            logger.warning("Data set %s has no ground truth for the model's output %r.", dataset_name, output)
    if not evaluators:
        raise ConfigError(
            f"DATASETS.TEST: data set {dataset_name} with evaluator_type {kind!r} can evaluate "
            f"{', '.join(EVALUATORS[kind])}, but the model has the outputs {', '.join(outputs)}. Choose a data set for "
            f"MODEL.KNET.TASK = {cfg.MODEL.KNET.TASK!r}, or change MODEL.KNET.TEST.OUTPUTS."
        )
    search = (dataset_name, cfg.MODEL.KNET.TASK)
    is_known = search in _searched or any(isinstance(x, _KNOW_ABSENT_CLASSES) for x in evaluators)
    if comm.is_main_process() and not is_known:
        _searched.add(search)
        with contextlib.suppress(KNetError):  # the loader raises it when the evaluation starts
            warn_of_absent_classes_in(load_dataset(dataset_name, "DATASETS.TEST"), [dataset_name], cfg)
    return evaluators


def best_metric(cfg: CfgNode) -> str:
    """Name of the scalar that decides on the best checkpoint: of the model's main output on the first test set."""
    output = get_task(cfg).checked_outputs(cfg.MODEL.KNET.TEST.OUTPUTS)[0]
    kind = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("evaluator_type", "") if cfg.DATASETS.TEST else ""
    metric = (_BEST_VIDEO_METRICS if kind.startswith("video_") else _BEST_METRICS).get(output, "")
    return metric if len(cfg.DATASETS.TEST) <= 1 else f"{cfg.DATASETS.TEST[0]}/{metric}"


def _kind_of_records(name: str) -> str | None:
    """Infer the evaluator_type of a data set from its records; None if they have no known annotations."""
    record = load_dataset(name, "DATASETS.TEST")[0]
    kinds = {"annotations": "coco", "sem_seg_file_name": "sem_seg"}
    return next((kind for key, kind in kinds.items() if key in record), None)
