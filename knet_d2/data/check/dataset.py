"""Checks all data sets of a config: each one by the check of its format, then the data sets against each other."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.transforms import AugmentationList
from tqdm import tqdm

from ...errors import KNetError
from ...tasks import get_task
from ..class_coverage import unit_of
from ..classes import ClassTable, resolve_classes
from ..coco_mending import mends_not_logged
from ..mapper import build_mapper
from ..pixels import PixelFormat
from ..records import load_dataset
from ..split import photo_of
from .counts import find_absent_classes
from .faults import ERROR, Fault
from .instances import check_annotations, check_instances
from .labels import check_labels
from .panoptic import check_panoptic
from .report import DatasetReport, Report, Use


def check_datasets(cfg: CfgNode) -> Report:
    """Check the data sets of DATASETS.TRAIN and DATASETS.TEST for use with MODEL.KNET.TASK.

    Args:
        cfg: a config whose DATASETS.CUSTOM are registered; its classes are resolved in place if there are no faults.
    """
    training, validation = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    reports = {name: _check_dataset(cfg, name) for name in dict.fromkeys([*training, *validation])}
    all_reports = [report for of_name in reports.values() for report in of_name]
    faults = list(dict.fromkeys(fault for report in all_reports for fault in report.faults))
    faults += _find_shared_images(
        [report for name in training for report in reports[name]],
        [report for name in validation if name not in training for report in reports[name]],
    )
    if not faults:
        try:
            resolve_classes(cfg)
        except KNetError as error:
            faults.append(Fault("other classes", "", "", str(error)))
    return Report(all_reports, faults)


def _check_dataset(cfg: CfgNode, name: str) -> list[DatasetReport]:
    problems: list[Fault] = []
    records: list[dict] = []
    try:
        # Loading creates the files of generated data sets, and sets the metadata that the checks read.
        with mends_not_logged():
            records = load_dataset(name)
    except KNetError as error:
        problems.append(Fault("unusable", name, "", str(error)))
    reports = _check_files(cfg, name, MetadataCatalog.get(name)) or [_check_by_mapper(cfg, name, records)]
    if not any(fault.level == ERROR for report in reports for fault in report.faults):
        reports[0].faults += problems
    return reports


def _check_files(cfg: CfgNode, name: str, metadata: Metadata) -> list[DatasetReport]:
    """Run the checks for the format of a data set; returns no report if there is no check for its format."""
    kind = metadata.get("evaluator_type")
    use, reports = _use(cfg, name), []
    # Cityscapes also has a panoptic JSON, but its file names follow other rules.
    if metadata.get("panoptic_json") and kind == "coco_panoptic_seg":
        paths = (metadata.panoptic_json, metadata.image_root, metadata.panoptic_root)
        reports.append(check_panoptic(name, *paths, use))
    if metadata.get("read_annotations"):
        reports.append(
            check_annotations(name, metadata.annotations, metadata.read_annotations, metadata.image_root, use)
        )
    if metadata.get("json_file") and kind in ("coco", "coco_panoptic_seg"):
        reports.append(check_instances(name, metadata.json_file, metadata.image_root, use))
    if kind == "sem_seg" and metadata.get("sem_seg_root"):
        label_map = metadata.get("sem_seg_label_map")
        folders = (metadata.image_root, metadata.sem_seg_root)
        colors = metadata.get("sem_seg_colors", [])
        reports.append(check_labels(name, *folders, metadata.stuff_classes, label_map, use, colors))
    return reports


def _use(cfg: CfgNode, name: str) -> Use:
    return Use(
        name in cfg.DATASETS.TRAIN,
        get_task(cfg),
        cfg.MODEL.KNET.NUM_KERNELS,
        PixelFormat.from_config(cfg),
        MetadataCatalog.get(name).get("part"),
    )


def _check_by_mapper(cfg: CfgNode, name: str, records: list[dict]) -> DatasetReport:
    """Check a data set of any other format: read each image with its ground truth as training does."""
    faults: list[Fault] = []
    try:
        cfg = cfg.clone()
        resolve_classes(cfg)
        mapper = build_mapper(cfg, is_train=True)
        mapper.augmentations = AugmentationList([])
    except KNetError as error:
        return DatasetReport(name, [Fault("unusable", name, "", str(error))], len(records))
    occurring: set[int] = set()
    for record in tqdm(records, f"Reading {name}", unit="image", mininterval=1, disable=None):
        try:
            example = mapper(record)
        except KNetError as error:
            faults.append(Fault("unusable", record["file_name"], "", str(error)))
            continue
        if "instances" in example:
            occurring |= set(example["instances"].gt_classes.tolist())
        if "sem_seg" in example:
            occurring |= set(example["sem_seg"].unique().tolist())
    task = get_task(cfg)
    names = {f"class {i}": x for i, x in enumerate(ClassTable.from_metadata(MetadataCatalog.get(name), task).names)}
    places = {f"class {i}" for i in occurring} & names.keys()  # without the label of ignored pixels
    faults += find_absent_classes(names, places, unit_of(task), name, _use(cfg, name), faults)
    return DatasetReport(name, faults, len(records))


def _find_shared_images(training: list[DatasetReport], validation: list[DatasetReport]) -> list[Fault]:
    """Find images of the training sets whose content, or another version of which, is in the validation sets, too."""
    trained = {facts.digest: path for report in training for path, facts in report.images.items()}
    photos = {photo_of(os.path.basename(path)): path for path in trained.values()}
    faults = []
    for path, facts in (item for report in validation for item in report.images.items()):
        name = os.path.basename(path)
        photo = photo_of(name)
        if facts.digest in trained:
            what = f"has the content of the training image {trained[facts.digest]}"
        elif photo != name and photo in photos:
            what = f"is by its name a version of the same photo as the training image {photos[photo]}"
        else:
            continue
        faults.append(Fault("training image in validation", path, "", what))
    return faults
