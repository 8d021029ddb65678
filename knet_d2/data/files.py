"""Reading of images, label maps and panoptic PNGs; whatever is wrong with a file is a DataError that names it."""

import glob
import io
import os
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from panopticapi.utils import rgb2id
from PIL import Image

from ..errors import DataError

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")


def find_images(inputs: Sequence[str]) -> list[str]:
    """The image files that names of files and folders and patterns stand for, in order.

    Raises:
        DataError: one of them stands for none.
    """
    files: list[str] = []
    for path in map(os.path.expanduser, inputs):
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if name.lower().endswith(IMAGE_TYPES))
            found = [os.path.join(path, name) for name in names]
        else:
            found = [path] if os.path.isfile(path) else sorted(glob.glob(path))
        if not found:
            raise DataError(f"{path}: no image there (files ending in {', '.join(IMAGE_TYPES)}).")
        files += found
    return files


def files_below(root: str, suffixes: Sequence[str], _parents: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The files in a folder and all folders in it with one of the suffixes, in the order of their names.

    A link to a folder is followed, unless that is one of the folders that the link is in.

    Yields:
        (path below root without suffix, path).
    """
    real = os.path.realpath(root)
    if real in _parents or not os.path.isdir(root):
        return
    for name in sorted(os.listdir(root)):
        path = os.path.join(root, name)
        stem, suffix = os.path.splitext(name)
        if os.path.isdir(path):
            for below, file in files_below(path, suffixes, (*_parents, real)):
                yield os.path.join(name, below), file
        elif suffix.lower() in suffixes:
            yield stem, path


def read_image(path: str, image_format: str) -> np.ndarray:
    """Read an image as Detectron2 does (EXIF rotation is applied): uint8 [H, W, C]."""
    _check_exists(path, "Image")
    try:
        return detection_utils.read_image(path, format=image_format)
    except Exception as error:
        raise DataError(
            f"Image {path} can't be read ({error}). Replace the file or take it out of the data set."
        ) from error


def read_labels(path: str, image_path: str = "", size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a label map: one channel of integers, or a palette image, whose indices count: int64 [H, W].

    Args:
        image_path, size: the image that it belongs to, and its (height, width), which is compared before anything is
            decoded; None: any.
    """
    labels = np.asarray(_open_png(path, "Label map", image_path, size))
    if labels.ndim != 2:
        raise DataError(
            f"Label map {path} is a colour image of shape {labels.shape}. It must have one channel with class ids."
        )
    return labels.astype(np.int64)


def read_panoptic(path: str, image_path: str = "", size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a panoptic PNG: uint8 [H, W, 3], segment id = R + 256 G + 65536 B; arguments as of read_labels."""
    return np.asarray(_open_png(path, "Panoptic PNG", image_path, size).convert("RGB"))


def segment_index(ids_rgb: np.ndarray, segment_ids: list[int]) -> np.ndarray:
    """Which segment owns a pixel.

    Args:
        ids_rgb: uint8 [H, W, 3] as read_panoptic gives it.
        segment_ids: ids of M segments, each > 0.

    Returns:
        [H, W] of the smallest unsigned type that holds M + 1: position in segment_ids, M where a pixel's id is 0
        (void), M + 1 where it is an unknown id.
    """
    ids = rgb2id(ids_rgb)
    known = np.array([*segment_ids, 0], dtype=np.int64)
    order = np.argsort(known)
    # Only the first pixel of a run is looked up, as neighbours mostly belong to the same segment
    flat = ids.reshape(-1)
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    values, lengths = flat[starts], np.diff(starts, append=flat.size)
    position = order[np.searchsorted(known[order], values).clip(max=len(known) - 1)]
    index = np.where(known[position] == values, position, len(known)).astype(np.min_scalar_type(len(known)))
    return np.repeat(index, lengths).reshape(ids.shape)


def _check_same_size(path: str, size: tuple[int, int], image_path: str, image_size: tuple[int, int]) -> None:
    """Raise a DataError unless both (height, width) are equal."""
    if tuple(size) != tuple(image_size):
        raise DataError(
            f"{path} is {size[1]} x {size[0]} pixels (width x height), but its image {image_path} is "
            f"{image_size[1]} x {image_size[0]}. They must have the same size."
        )


def _open_png(path: str, what: str, image_path: str, size: tuple[int, int] | None) -> Image.Image:
    _check_exists(path, what)
    try:
        with PathManager.open(path, "rb") as f:
            content = io.BytesIO(f.read())  # Pillow would reserve whatever length a damaged part claims to have
        image = Image.open(content)
        if size is not None:
            _check_same_size(path, image.size[::-1], image_path, size)
        image.load()
        return image
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what} {path} can't be read ({error}). Replace the file.") from error


def _check_exists(path: str, what: str) -> None:
    if not PathManager.isfile(path):
        raise DataError(
            f"{what} {path} does not exist. Put it there, correct the path of its data set, or set the environment "
            "variable DETECTRON2_DATASETS to the folder that holds the data sets."
        )
