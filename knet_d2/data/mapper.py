"""From a record of a data set (Detectron2's standard dict) to what the model takes.

Shapes: H x W the image as read, h x w after augmentation, M the instances of an image.
"""

import copy
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances, polygons_to_bitmask

from ..errors import ConfigError, DataError
from ..tasks import Task, get_task
from .augmentation import build_augmentations, has_default_augmentations, padded_size
from .files import IGNORE_LABEL, read_image, read_labels, read_panoptic
from .pixels import PixelFormat
from .segmentation import check_coordinates, from_kitti_step, read_rle, segment_index

_ANNOTATION_KEYS = (
    "annotations",
    "segments_info",
    "sem_seg_file_name",
    "sem_seg_label_map",
    "sem_seg_colors",
    "pan_seg_file_name",
)


class KNetDatasetMapper:
    """Reads and augments an image, in training with its ground truth.

    What is read depends on what the task learns from and on what the record has:

    ===========  ==========================================================
    instances    "annotations", else "pan_seg_file_name" + "segments_info"
    sem_seg      "sem_seg_file_name", else "pan_seg_file_name" + "segments_info"
    both         "pan_seg_file_name" + "segments_info" (COCO panoptic), else "annotations" + "sem_seg_file_name"
    ===========  ==========================================================

    Where instances are learned, crowds are left out: from the masks, and from the label map of a panoptic PNG.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        task: Task,
        augmentations: list,
        pixel_format: PixelFormat,
        thing_category_ids: list[int],
        stuff_category_ids: list[int],
        ignore_value: int,
        pad_size: tuple[int, int] | None = None,
        pad_pixel: tuple[float, ...] = (0.0,),
        padded_size: tuple[int, int] | None = None,
    ) -> None:
        """
        Args:
            is_train: whether ground truth is read.
            task: tells which annotations are read.
            augmentations: Detectron2's augmentations or transforms.
            pixel_format: of INPUT.
            thing_category_ids: the metadata's contiguous id of each thing class of the model.
            stuff_category_ids: the same for the stuff classes, whose labels in the model follow those of the things.
            ignore_value: label of pixels without a class.
            pad_size: smallest (height, width) of training examples with "sem_seg"; smaller ones are padded.
            pad_pixel: the colour to pad with, in pixel_format.
            padded_size: least (height, width) of padded training batches.
        """
        self.is_train = is_train
        self.task = task
        self.augmentations = T.AugmentationList(augmentations)
        self.pixel_format = pixel_format
        self.thing_classes = {category: i for i, category in enumerate(thing_category_ids)}
        self.stuff_classes = {category: len(thing_category_ids) + i for i, category in enumerate(stuff_category_ids)}
        self.ignore_value = ignore_value
        self.pad_size = pad_size
        self.pad_pixel = pad_pixel
        self.padded_size = padded_size

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        knet, crop, task = cfg.MODEL.KNET, cfg.INPUT.CROP, get_task(cfg)
        crops = is_train and has_default_augmentations(cfg) and crop.ENABLED and crop.TYPE == "absolute"
        pads = crops and "instances" not in task.annotations
        augmentations = build_augmentations(cfg, is_train)
        return {
            "is_train": is_train,
            "task": task,
            "augmentations": augmentations,
            "pixel_format": PixelFormat.from_config(cfg),
            "thing_category_ids": knet.THING_CATEGORY_IDS,
            "stuff_category_ids": knet.STUFF_CATEGORY_IDS,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "pad_size": tuple(int(x) for x in crop.SIZE) if pads else None,
            "pad_pixel": tuple(cfg.MODEL.PIXEL_MEAN),
            "padded_size": padded_size(augmentations),
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: "file_name" and annotations; it stays as it is.

        Returns:
            dict: the record without annotations, and "image": uint8 or float32 [C, h, w], 0 to 255. In training also
                "instances" (gt_classes, gt_masks as BitMasks) and "sem_seg": int64 [h, w], as far as the task learns
                from them, and "padded_size" if there is one.
        """
        image = read_image(record["file_name"], self.pixel_format)
        result = {key: copy.deepcopy(value) for key, value in record.items() if key not in _ANNOTATION_KEYS}
        try:
            detection_utils.check_image_size(result, image)
        except detection_utils.SizeMismatchError as error:
            raise DataError(f"Image {record['file_name']}: {error}") from error
        if not self.is_train:
            aug_input = T.AugInput(image)
            self.augmentations(aug_input)
            result["image"] = _to_tensor(aug_input.image)
            return result
        result.update(self._read_example(record, image))
        return result

    def has_ground_truth(self, record: dict[str, Any]) -> bool:
        """Whether a record has all that the task learns from."""
        return self._has_own(record) or self._is_read_from_png(record)

    def annotated_classes(self, record: dict[str, Any]) -> set[int]:
        """Return the classes of the instances or segments of a record, without crowds that training ignores.

        Classes of a label map are known only by reading it: see label_map_classes.

        Raises:
            DataError: a category_id is not among the model's.
        """
        learns_instances = "instances" in self.task.annotations
        if self._is_read_from_png(record):
            objects, classes = record["segments_info"], self._segment_classes(record)
        elif learns_instances:
            objects = record.get("annotations", ())
            classes = [self._class_of(x, True, record) for x in objects]
        else:
            return set()
        num_classes = len(self.thing_classes) + len(self.stuff_classes)
        return {
            k
            for x, k in zip(objects, classes, strict=True)
            if k < num_classes and not (learns_instances and x.get("iscrowd", 0))
        }

    def reads_label_map(self, record: dict[str, Any]) -> bool:
        """Whether classes of this record stand only in a label map."""
        needs = "sem_seg" in self.task.annotations and "sem_seg_file_name" in record
        return needs and not self._is_read_from_png(record)

    def labels(self, record: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        """The model's class of each pixel of an image as it is, uint8 [H, W], or the ignore value."""
        if self._is_read_from_png(record):
            return self._segment_labels(record, read_panoptic_segments(record, size)[1])
        return self._read_label_map(record, size)

    def label_map_classes(self, record: dict[str, Any]) -> set[int]:
        """Return the classes of the pixels in the label map of a record."""
        return set(np.unique(self._read_label_map(record, None)).tolist()) - {self.ignore_value}

    def _has_own(self, record: dict[str, Any]) -> bool:
        """Whether a record has all that the task learns from without a panoptic PNG."""
        keys = {"instances": "annotations", "sem_seg": "sem_seg_file_name"}
        return all(keys[x] in record for x in self.task.annotations)

    def _is_read_from_png(self, record: dict[str, Any]) -> bool:
        return "pan_seg_file_name" in record and (len(self.task.annotations) > 1 or not self._has_own(record))

    def _read_example(self, record: dict[str, Any], image: np.ndarray) -> dict[str, Any]:
        needed, size = self.task.annotations, image.shape[:2]
        if not self.has_ground_truth(record):
            raise DataError(
                f"Image {record['file_name']} has no ground truth for MODEL.KNET.TASK {self.task.name!r}, which needs "
                f"{self.task.annotation_files}. Choose another data set (DATASETS.TRAIN) or task."
            )
        png = index = labels = None
        if self._is_read_from_png(record):
            png, index = read_panoptic_segments(record, size)
        if "sem_seg" in needed:
            labels = self._read_label_map(record, size) if index is None else self._segment_labels(record, index)
        # Detectron2 resizes uint8 by PIL and other types by PyTorch, whose nearest neighbour is another one. The image
        # is resized by PIL, so labels must be uint8, too
        aug_input = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(aug_input)
        image, labels = aug_input.image, aug_input.sem_seg
        # Transforms fill the pixels that they add with 0 or 255: a class in a label map, an object in a mask
        added = transforms.apply_segmentation(np.ones(size, np.uint8)) != 1
        example: dict[str, Any] = {}
        if "instances" in needed:
            example["instances"] = self._instances(record, png, transforms, size, added)
        if labels is not None and added.any():
            labels = np.where(added, np.uint8(self.ignore_value), labels)
        if self.pad_size is not None:
            image = pad_image(image, self.pad_size, self.pad_pixel)
            labels = pad_image(labels, self.pad_size, (self.ignore_value,))
        example["image"] = _to_tensor(image)
        if self.padded_size is not None:
            example["padded_size"] = self.padded_size
        if labels is not None:
            example["sem_seg"] = torch.from_numpy(labels.astype(np.int64))
        return example

    def _instances(
        self,
        record: dict[str, Any],
        png: np.ndarray | None,
        transforms: T.TransformList,
        image_size: tuple[int, int],
        added: np.ndarray,
    ) -> Instances:
        """The things of a panoptic PNG, or the annotations, after augmentation.

        Args:
            image_size: (height, width) before augmentation.
            added: bool [h, w], pixels that show nothing of the image.
        """
        size = added.shape
        if png is None:
            annotations = [x for x in record["annotations"] if not x.get("iscrowd", 0)]
            classes = [self._class_of(x, True, record) for x in annotations]
            found = [annotation_mask(x, transforms, image_size, size, record) for x in annotations]
            has_tracks = "video_id" in record and all("track_id" in x for x in annotations)
            tracks = [x["track_id"] for x in annotations] if has_tracks else None
            masks = np.stack(found) if found else np.zeros((0, *size), bool)
            return make_instances(_without(masks, added), classes, size, tracks)
        segments = record["segments_info"]
        # The three bytes of the PNG are augmented, not its index: PIL resizes 8 bits, and segments may be more than 256
        index = segment_index(transforms.apply_segmentation(png), [x["id"] for x in segments])
        classes = self._segment_classes(record)
        things = [i for i, x in enumerate(segments) if classes[i] < len(self.thing_classes) and not x.get("iscrowd", 0)]
        masks = index == np.array(things, dtype=index.dtype)[:, None, None]
        tracks = [segments[i]["id"] for i in things] if "video_id" in record else None
        return make_instances(_without(masks, added), [classes[i] for i in things], size, tracks)

    def _segment_labels(self, record: dict[str, Any], index: np.ndarray) -> np.ndarray:
        """Model classes of the pixels of a panoptic PNG, uint8 [H, W]; void is ignored.

        index: see segment_index.
        """
        segments = record["segments_info"]
        ignored = [bool(x.get("iscrowd", 0)) and "instances" in self.task.annotations for x in segments]
        classes = self._segment_classes(record)
        lookup = [self.ignore_value if i else k for i, k in zip(ignored, classes, strict=True)]
        return np.array([*lookup, self.ignore_value], np.uint8)[index]

    def _segment_classes(self, record: dict[str, Any]) -> list[int]:
        """The model's class of each segment of a panoptic PNG."""
        # Cityscapes' segments don't say whether they are things; there, a thing and a stuff class never share an id
        return [
            self._class_of(x, x.get("isthing", x["category_id"] in self.thing_classes), record)
            for x in record["segments_info"]
        ]

    def _read_label_map(self, record: dict[str, Any], size: tuple[int, int] | None) -> np.ndarray:
        """Model classes of the stuff pixels, uint8 [H, W]; all other pixels (things, crowds, void) are ignored."""
        # Every id of the metadata is a valid label: those that the model has no stuff class for are things.
        labels = read_sem_seg(record, size, max(self.stuff_classes, default=0) + 1, self.ignore_value)
        lookup = np.full(256, self.ignore_value, np.uint8)
        lookup[list(self.stuff_classes)] = list(self.stuff_classes.values())
        return lookup[labels]

    def _class_of(self, segment: dict[str, Any], isthing: bool, record: dict[str, Any]) -> int:
        """The model's class; stuff that an instance model does not have is ignored.

        A semantic model, which has no thing classes, counts things among the stuff.
        """
        category = segment["category_id"]
        isthing = isthing and bool(self.thing_classes)
        classes = self.thing_classes if isthing else self.stuff_classes
        if category in classes:
            return classes[category]
        if not isthing and not self.stuff_classes:  # an instance model: any label that no thing has
            return max(self.ignore_value, len(self.thing_classes))
        known = f"{len(self.thing_classes)} thing and {len(self.stuff_classes)} stuff classes"
        raise DataError(
            f"The annotations of image {record['file_name']} have category_id {category} "
            f"({'thing' if isthing else 'stuff'}), which is not among the model's {known}. "
            "Correct the annotation or MODEL.KNET.NUM_THING_CLASSES / NUM_STUFF_CLASSES, or choose another data set "
            f"(DATASETS.TRAIN) for MODEL.KNET.TASK {self.task.name!r}, which needs {self.task.annotation_files}."
        )


def build_mapper(cfg: CfgNode, is_train: bool) -> KNetDatasetMapper:
    """The mapper of MODEL.KNET.TASK; the config's classes must be resolved (see resolve_classes)."""
    knet = cfg.MODEL.KNET
    if is_train and not (knet.THING_CATEGORY_IDS or knet.STUFF_CATEGORY_IDS):
        raise ConfigError("The classes of MODEL.KNET are not known yet: call knet_d2.data.resolve_classes(cfg) first.")
    num_classes, ignore = knet.NUM_THING_CLASSES + knet.NUM_STUFF_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    learns_labels = "sem_seg" in get_task(cfg).annotations
    if learns_labels and num_classes > 255:
        raise ConfigError(f"MODEL.KNET has {num_classes} classes: learn at most 255 from label maps of 8 bits.")
    if learns_labels and not num_classes <= ignore <= 255:
        raise ConfigError(f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignore}; it must be {num_classes} (classes) to 255.")
    return KNetDatasetMapper(cfg, is_train)


def build_truth_mapper(cfg: CfgNode, augmentations: list) -> KNetDatasetMapper:
    """Ground truth as in training, but without training's augmentations and padding.

    Args:
        augmentations: what happens to the images instead; []: they stay as they are.
    """
    arguments = KNetDatasetMapper.from_config(cfg, is_train=True)
    return KNetDatasetMapper(**{**arguments, "augmentations": augmentations, "pad_size": None, "padded_size": None})


def build_loss_mapper(cfg: CfgNode) -> KNetDatasetMapper:
    """Ground truth as in training, images as in testing."""
    return build_truth_mapper(cfg, build_augmentations(cfg, is_train=False))


def read_sem_seg(
    record: dict[str, Any], size: tuple[int, int] | None, num_classes: int, ignore_value: int
) -> np.ndarray:
    """Read "sem_seg_file_name" as labels 0..num_classes-1 and ignore_value: int64 [H, W].

    A record may have "sem_seg_label_map", an array: value in the file -> label, IGNORE_LABEL where it is ignored, -1
    where it must not occur; and "sem_seg_colors", see read_labels.
    """
    path = record["sem_seg_file_name"]
    raw = read_labels(path, record["file_name"], size, record.get("sem_seg_colors", ()))
    lookup = record.get("sem_seg_label_map")
    if lookup is None:
        labels = raw
    else:
        labels = np.where(raw < len(lookup), np.asarray(lookup, np.int64)[raw.clip(max=len(lookup) - 1)], -1)
        labels = np.where(labels == IGNORE_LABEL, ignore_value, labels)
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_value)
    if wrong.any():
        raise DataError(
            f"Label map {path} holds the value {raw[wrong][0]}, which is neither one of the {num_classes} classes nor "
            f"ignored ({np.count_nonzero(wrong)} pixels have such values). Correct the file, the classes or the "
            "values that its data set ignores."
        )
    return labels


def read_panoptic_segments(record: dict[str, Any], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Read "pan_seg_file_name", checked against "segments_info": uint8 [H, W, 3], and its segment_index [H, W]."""
    path = record["pan_seg_file_name"]
    ids_rgb = read_panoptic(path, record["file_name"], size)
    if record.get("pan_seg_encoding") == "kitti_step":
        ids_rgb = from_kitti_step(ids_rgb)
    ids = [x["id"] for x in record["segments_info"]]
    index = segment_index(ids_rgb, ids)
    pixels = np.bincount(index.reshape(-1), minlength=len(ids) + 2)
    if pixels[-1]:
        unknown = ids_rgb[index > len(ids)][0].astype(np.int64) @ [1, 256, 65536]
        raise DataError(
            f"Panoptic PNG {path} has segment id {unknown}, which its JSON's segments_info lacks. "
            "Add the segment to the JSON or paint it 0 (void)."
        )
    for segment, count in zip(record["segments_info"], pixels, strict=False):
        if not count:
            raise DataError(
                f"The JSON's segments_info of panoptic PNG {path} has segment id {segment['id']}, which the PNG lacks. "
                "Remove the segment from the JSON or paint it."
            )
    return ids_rgb, index


def annotation_mask(
    annotation: dict[str, Any],
    transforms: T.TransformList,
    image_size: tuple[int, int],
    size: tuple[int, int],
    record: dict[str, Any],
) -> np.ndarray:
    """The mask of one annotation (polygons, RLE or a bitmask) after augmentation: bool [h, w].

    Args:
        annotation: with "segmentation" as polygons, compressed or uncompressed RLE, or an array [H, W].
        transforms: what happened to the image.
        image_size, size: (height, width) before and after.
        record: the image's, for the error message.
    """
    segmentation = annotation.get("segmentation")
    try:
        if not isinstance(segmentation, (list, dict, np.ndarray)) or len(segmentation) == 0:
            raise DataError("it is missing, empty or of another type")
        if isinstance(segmentation, list):
            for polygon in segmentation:
                check_coordinates(polygon if isinstance(polygon, list) else np.asarray(polygon).tolist())
            # Not apply_polygons, which needs shapely to clip: the rasteriser clips to the image by itself.
            polygons = [np.array(x, np.float64).reshape(-1, 2) for x in segmentation]
            polygons = [transforms.apply_coords(x).reshape(-1) for x in polygons]
            return polygons_to_bitmask(polygons, *size)
        if isinstance(segmentation, dict):
            segmentation = mask_util.decode(read_rle(segmentation, image_size))
        if segmentation.shape != tuple(image_size):
            raise DataError(f"its mask has (height, width) {segmentation.shape}, the image {tuple(image_size)}")
        return transforms.apply_segmentation(segmentation.astype(np.uint8)).astype(bool)
    except Exception as error:
        raise DataError(
            f"Image {record['file_name']}: the segmentation of an annotation (category_id "
            f"{annotation.get('category_id')}, bbox {annotation.get('bbox')}) can't be used: {error}. It must be "
            "polygons, RLE or a bitmask of the image's size."
        ) from error


def _without(masks: np.ndarray, added: np.ndarray) -> np.ndarray:
    """bool [M, h, w] with False where added [h, w] is True."""
    return masks & ~added if added.any() else masks


def make_instances(
    masks: np.ndarray, classes: list[int], size: tuple[int, int], tracks: list[int] | None = None
) -> Instances:
    """Instances from masks, bool [M, h, w], without those that are empty; the order stays.

    Args:
        tracks: numbers that are the same in all frames of a video; they become gt_track_ids.
    """
    keep = masks.reshape(len(masks), size[0] * size[1]).any(axis=1)
    instances = Instances(tuple(size))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)[torch.from_numpy(keep)]
    instances.gt_masks = BitMasks(torch.from_numpy(np.ascontiguousarray(masks[keep])))
    if tracks is not None:
        instances.gt_track_ids = torch.tensor(tracks, dtype=torch.int64)[torch.from_numpy(keep)]
    return instances


def pad_image(image: np.ndarray, size: tuple[int, int], value: tuple[float, ...]) -> np.ndarray:
    """Pad [h, w] or [h, w, C] at the right and bottom to at least size; value: one number per channel."""
    height, width = max(image.shape[0], size[0]), max(image.shape[1], size[1])
    padded = np.empty((height, width, *image.shape[2:]), image.dtype)
    padded[:] = np.round(value).astype(image.dtype) if image.ndim == 3 else value[0]
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """[h, w, C], or [h, w] as some transforms leave one channel -> [C, h, w]."""
    return torch.as_tensor(np.ascontiguousarray(np.atleast_3d(image).transpose(2, 0, 1)))
