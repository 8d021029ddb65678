"""Finds the annotations in a folder and describes them as entries of DATASETS.CUSTOM."""

import contextlib
import csv
import functools
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from .custom import IMAGE_SUFFIXES
from .files import files_below, read_labels
from .formats.builder import class_names, read_text, read_yaml
from .formats.masks import read_labelmap

# Names of the parts of a data set in files and folders
_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "semantic", "gt", "groundtruth")
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "photos")
# Formats whose annotations need not name the classes of objects
_UNNAMED = ("via", "instance_png", "png_per_instance")
# Share that is held out where a folder has no part for validation.
VALIDATION = 0.2
_DEEPEST = 3
_SAMPLE = 20


class Found(NamedTuple):
    """The data sets that were found in a folder.

    Attributes:
        what: format and place, for a message.
        task: task that the annotations are for.
        entries: entries of DATASETS.CUSTOM.
        train, test: names for DATASETS.TRAIN and DATASETS.TEST.
    """

    what: str
    task: str
    entries: list[dict[str, Any]]
    train: list[str]
    test: list[str]


def find_annotations(folder: str, task: str | None = None, names: Sequence[str] = ()) -> Found:
    """Find the annotations in a folder and its sub-folders.

    Args:
        folder: a folder with images and annotations in one of the formats of docs/DATASETS.md; or one annotation file,
            whose images are searched in its folder.
        task: "instance", "panoptic" or "semantic"; None: what the annotations that are found first are for.
        names: of the classes of label maps, in the order of their values; of COCO's categories, in the order of their
            ids; or the name of the only class, where the annotations name none. Others have names already.

    Raises:
        DataError: there is no such folder, or nothing is found that fits the task or the names.
    """
    if not os.path.exists(folder):
        raise DataError(f"--data {folder}: there is no such folder or file. Name that of your images and annotations.")
    folder = os.path.abspath(folder)
    is_file = os.path.isfile(folder)
    name = re.sub(r"\W+", "_", os.path.splitext(os.path.basename(folder))[0] if is_file else os.path.basename(folder))
    name = name.strip("_") or "data"
    others = []
    masks = functools.partial(_find_masks, names=names)
    for find in (_find_yolo, _find_json) if is_file else (_find_yolo, _find_json, _find_voc, masks):
        candidates = find(folder)
        for kind, what, parts in candidates:
            if task is None or task == kind:
                if isinstance(parts, DataError):
                    raise parts
                if names:
                    _name_classes(parts.values(), names, what)
                return _found(name, kind, what + _not_read(candidates, what), parts)
            others.append(f"{what} (task {kind})")
    if others:
        raise DataError(f"--data {folder}: has no annotations for --task {task}, but {others[0]}. Leave out --task.")
    raise DataError(
        f"--data {folder}: no annotations were found. knet docs DATASETS lists the formats. If your files have other "
        "names than usual, name the data set in a config."
    )


def _name_classes(entries: Iterable[dict[str, Any]], names: Sequence[str], what: str) -> None:
    """Give names to COCO's categories, or one to annotations that need not name it; label maps have theirs already."""
    for entry in entries:
        if entry["type"] == "coco_instance" or (entry["type"] in _UNNAMED and len(names) == 1):
            entry["classes"] = list(names)
        elif "label_values" not in entry:
            raise DataError(f"--names {','.join(names)}: {what} have names already. Leave it out.")


# (task, description, {part: entry without a name}, or why it can't be used); the part "train" alone is split.
_Candidate = tuple[str, str, dict[str, dict[str, Any]] | DataError]


def _not_read(candidates: Iterator[_Candidate], chosen: str) -> str:
    """A remark on further annotations of the same kind of files; "" without any."""
    others = []
    with contextlib.suppress(DataError):  # of what is not read
        others = [what for _, what, _ in candidates if what != chosen]
    return f" (not read: {', '.join(others)})" if others else ""


def _found(name: str, task: str, what: str, parts: dict[str, dict[str, Any]]) -> Found:
    if len(parts) == 1:
        (entry,) = parts.values()
        whole = {"name": name, **entry, "validation": VALIDATION}
        return Found(what, task, [whole], [f"{name}_train"], [f"{name}_val"])
    entries = [{"name": f"{name}_{part}", **entry} for part, entry in parts.items()]
    train = "train" if "train" in parts else next(iter(parts))
    test = next(part for part in ("val", "test", *parts) if part in parts and part != train)
    return Found(what, task, entries, [f"{name}_{train}"], [f"{name}_{test}"])


def _part_of(name: str) -> str | None:
    """The part that a file or folder name tells, for example "instances_val2017.json"; None if it tells none."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((part for part, names in _PARTS.items() if set(words) & set(names)), None)


def _files(folder: str, endings: tuple[str, ...]) -> Iterator[str]:
    """Files with one of the endings in a folder and those in it; or ``folder`` itself if it is such a file."""
    if folder.lower().endswith(endings) and os.path.isfile(folder):
        yield folder
    for _, path in files_below(folder, endings):
        if os.path.relpath(path, folder).count(os.sep) <= _DEEPEST:
            yield path


# ---- YOLO


def _find_yolo(folder: str) -> Iterator[_Candidate]:
    for path in _files(folder, (".yaml", ".yml")):
        content = read_yaml(path)
        if not isinstance(content, dict) or "names" not in content:
            continue
        base = os.path.dirname(path)
        roots = [os.path.join(base, str(content["path"])), base] if content.get("path") else [base]
        parts = {}
        for part in _PARTS:
            images = _yolo_images(content.get(part), roots)
            if images:
                entry = {"type": "yolo_seg", "images": images, "labels": _yolo_labels(images), "classes": path}
                parts[part] = entry
        # Many state a test set that they have not; without its training set, the validation set would be trained on
        missing = next((x for x in ("train", "val") if content.get(x) and x not in parts), None)
        if parts and missing:
            raise DataError(
                f"{path}: {missing} = {content[missing]!r}: name one folder of images that exists; or name the data "
                "sets in a config, see knet docs DATASETS."
            )
        # As coco128.yaml does: what is trained on can't be held out
        repeated = [x for x in parts if x != "train" and parts[x]["images"] == parts.get("train", {}).get("images")]
        of_training = f" ({' and '.join(repeated)}: the images of train, so left out)" if repeated else ""
        if parts:
            yield "instance", f"YOLO's {path}{of_training}", {x: parts[x] for x in parts if x not in repeated}


def _yolo_images(stated: Any, roots: list[str]) -> str | None:
    stated = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    if not isinstance(stated, str):
        return None
    # Roboflow writes ../train/images for a folder that lies beside data.yaml
    names = [stated, re.sub(r"^(\.\./)+", "", stated)]
    paths = (os.path.normpath(os.path.join(root, name)) for root in roots for name in names)
    return next((path for path in paths if os.path.isdir(path)), None)


def _yolo_labels(images: str) -> str:
    """The folder of the labels: the last folder "images" in the path is called "labels"."""
    parts = images.split(os.sep)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return os.sep.join(parts)


# ---- JSON and CSV


def _find_json(folder: str) -> Iterator[_Candidate]:
    by_format: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    labelme = set()
    paths = list(_files(folder, (".json", ".csv")))
    folder = os.path.dirname(folder) if os.path.isfile(folder) else folder
    for path in paths:
        if path.lower().endswith(".csv"):
            rows = _csv_rows(path)
            if rows and "region_shape_attributes" in rows[0]:
                names = [row.get("filename") or row.get("#filename") for row in rows]
                entry = {"type": "via", "annotations": path, "images": _folder_of(path, folder, names)}
                by_format.setdefault(("instance", "VIA's"), {})[path] = entry
            continue
        try:
            with open(path, "rb") as f:
                content = json.loads(f.read())
        except (ValueError, RecursionError):
            continue
        if not isinstance(content, dict):
            continue
        if isinstance(content.get("shapes"), list):
            labelme.add(os.path.dirname(path))
        for fits, task, title, make in _JSON_FORMATS:
            if fits(content):
                by_format.setdefault((task, title), {})[path] = make(path, folder, content)
                break
    for (task, title), entries in by_format.items():
        parts = _by_part(entries, folder)
        yield task, (what := f"{title} {', '.join(entries)}"), parts
        if task == "panoptic":  # its PNGs have a class at each pixel, too
            yield "semantic", what, parts
    if labelme:
        root = os.path.commonpath(labelme)
        images = {} if any(files_below(root, IMAGE_SUFFIXES)) else {"images": _images_beside(root)}
        yield (
            "instance",
            f"labelme's JSON files in {root}",
            {"train": {"type": "labelme", "annotations": root, **images}},
        )


def _csv_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a CSV file; [] if it can't be read, as it may have nothing to do with annotations."""
    try:
        return list(csv.DictReader(io.StringIO(read_text(path))))
    except (csv.Error, DataError):
        return []


def _by_part(entries: dict[str, dict[str, Any]], root: str) -> dict[str, dict[str, Any]]:
    """Entries by part; a file whose name or folder below root tells no part is for training."""
    parts: dict[str, dict[str, Any]] = {}
    for path, entry in entries.items():
        folder = os.path.basename(os.path.dirname(os.path.relpath(path, root)))
        part = _part_of(os.path.basename(path)) or _part_of(folder) or "train"
        if part in parts:
            raise DataError(
                f"{path}: this and another annotation file are both for {part}. Name one of them: --data FILE; or both "
                "in a config, see knet docs DATASETS."
            )
        parts[part] = entry
    return parts


def _is_coco(content: dict) -> bool:
    return all(isinstance(content.get(key), list) for key in ("images", "annotations", "categories"))


def _is_panoptic(content: dict) -> bool:
    return _is_coco(content) and any("segments_info" in x for x in content["annotations"][:1] if isinstance(x, dict))


def _is_via(content: dict) -> bool:
    images = content.get("_via_img_metadata", content)
    first = next(iter(images.values()), None) if isinstance(images, dict) else None
    return isinstance(first, dict) and "filename" in first and "regions" in first


def _coco_entry(path: str, folder: str, content: dict) -> dict[str, Any]:
    names = [x.get("file_name") for x in content["images"] if isinstance(x, dict)]
    return {"type": "coco_instance", "json": path, "images": _folder_of(path, folder, names)}


def _panoptic_entry(path: str, folder: str, content: dict) -> dict[str, Any]:
    names = [x.get("file_name") for x in content["images"] if isinstance(x, dict)]
    pngs = [x.get("file_name") for x in content["annotations"] if isinstance(x, dict)]
    beside = os.path.splitext(path)[0]
    root = beside if os.path.isdir(beside) else _folder_of(path, folder, pngs)
    images = _folder_of(path, folder, names, but=root)
    return {"type": "coco_panoptic", "panoptic_json": path, "images": images, "panoptic_root": root}


def _via_entry(path: str, folder: str, content: dict) -> dict[str, Any]:
    images = content.get("_via_img_metadata", content)
    return {
        "type": "via",
        "annotations": path,
        "images": _folder_of(path, folder, [x.get("filename") for x in images.values() if isinstance(x, dict)]),
    }


_JSON_FORMATS: list[tuple[Callable[[dict], bool], str, str, Callable[[str, str, dict], dict[str, Any]]]] = [
    (_is_panoptic, "panoptic", "COCO's panoptic", _panoptic_entry),
    (_is_coco, "instance", "COCO's", _coco_entry),
    (_is_via, "instance", "VIA's", _via_entry),
]


def _folder_of(path: str, root: str, names: list[Any], but: str = "") -> str:
    """The folder that has most of the first files of a list, by the ends of their paths.

    Args:
        path: annotation file; of folders that have as many, one of the same part wins, then the folder of this file.
        root: folder that is searched.
        names: file names in the annotations.
        but: a folder that is left out.
    """
    wanted = [re.split(r"[\\/]+", x) for x in names[:_SAMPLE] if isinstance(x, str)]
    folders = dict.fromkeys([os.path.dirname(path), root])
    for _, file in files_below(root, IMAGE_SUFFIXES):
        folders.setdefault(os.path.dirname(file))

    part = _part_of(os.path.basename(path))

    def hits(folder: str) -> tuple[int, bool]:
        ends = ((os.path.join(folder, *parts[i:]) for i in range(len(parts))) for parts in wanted)
        found = sum(any(os.path.isfile(x) for x in of_name) for of_name in ends)
        return found, part is not None and _part_of(os.path.relpath(folder, root)) == part

    return max((x for x in folders if x != but), key=hits)


def _images_beside(folder: str) -> str:
    parent = os.path.dirname(folder)
    return next((x for name in _IMAGE_FOLDERS if os.path.isdir(x := os.path.join(parent, name))), folder)


# ---- folders of PNGs


def _find_voc(folder: str) -> Iterator[_Candidate]:
    for root in (folder, *(os.path.join(folder, x) for x in sorted(os.listdir(folder)))):
        if all(os.path.isdir(os.path.join(root, x)) for x in ("JPEGImages", "SegmentationObject")):
            yield "instance", f"masks in Pascal VOC's layout in {root}", {"train": {"type": "voc", "root": root}}
        table = os.path.join(root, "labelmap.txt")
        if os.path.isfile(table) and os.path.isdir(os.path.join(root, "SegmentationClass")):
            entry = {
                **{"type": "sem_seg", "images": os.path.join(root, "JPEGImages"), "colors": table},
                **{"labels": os.path.join(root, "SegmentationClass"), "classes": list(read_labelmap(table))},
            }
            yield "semantic", f"masks in colour in {root}", {"train": entry}


def _find_masks(folder: str, names: Sequence[str]) -> Iterator[_Candidate]:
    """A folder of images and one of masks beside it, as they are, or both in the folders of parts, or parts in both.

    Args:
        names: of the classes, see :func:`find_annotations`.
    """
    nested = [x for x in sorted(os.listdir(folder)) if os.path.isdir(os.path.join(folder, x, "masks"))]
    if (
        nested
        and all(os.path.isdir(os.path.join(folder, x, "images")) for x in nested)
        and not any(map(_part_of, nested))
    ):
        entry = {"type": "png_per_instance", "images": folder, "masks": folder}
        yield "instance", f"a PNG for each object in {folder}/*/masks", {"train": entry}
        return
    pairs: dict[str, tuple[str, str]] = {}
    for root in _folders(folder):
        images, masks = (_subfolder(root, names) for names in (_IMAGE_FOLDERS, _MASK_FOLDERS))
        if not (images and masks):
            continue
        parts = {part: x for x in sorted(os.listdir(images)) if (part := _part_of(x)) and os.path.isdir(f"{masks}/{x}")}
        if root == folder and parts:
            pairs |= {part: (os.path.join(images, x), os.path.join(masks, x)) for part, x in parts.items()}
        else:
            pairs.setdefault(_part_of(os.path.basename(root)) or "train", (images, masks))
    if not pairs:
        return
    images, masks = pairs.get("train") or next(iter(pairs.values()))
    stems = {stem for stem, _ in files_below(images, IMAGE_SUFFIXES)}
    labels = dict(files_below(masks, (".png",)))
    if not labels and (lossy := next(files_below(masks, (".jpg", ".jpeg")), None)):
        raise DataError(f"{lossy[1]}: a mask as JPEG has other values than were saved. Export the masks as PNG.")
    if stems & set(labels):
        sample = _sample_of(list(labels.values()))
        if not sample:
            return
        total = sum(sample.values(), Counter())
        shares = {x: total[x] / total.total() for x in sorted(total)}
        what = f"masks in {masks}"
        numbered = {part: {"type": "instance_png", "images": i, "masks": m} for part, (i, m) in pairs.items()}
        labelled: dict[str, dict[str, Any]] | DataError
        try:
            classes = _semantic_classes(folder, sample, names)
            labelled = {p: {"type": "sem_seg", "images": i, "labels": m, **classes} for p, (i, m) in pairs.items()}
        except DataError as error:
            classes, labelled = {}, error
        yield "semantic", what + _meaning(shares, classes, names), labelled
        if len(shares) > 2:  # two values tell objects from background, but not from each other
            yield "instance", what, numbered
    elif labels:
        entries = {part: {"type": "png_per_instance", "images": i, "masks": m} for part, (i, m) in pairs.items()}
        yield "instance", f"a PNG for each object in {masks}", entries


def _folders(folder: str) -> Iterator[str]:
    """A folder and those in it, the outer ones first."""
    level = [folder]
    for _ in range(_DEEPEST + 1):
        yield from level
        inner = [os.path.join(root, x) for root in level for x in sorted(os.listdir(root))]
        level = [x for x in inner if os.path.isdir(x)]


def _subfolder(root: str, names: tuple[str, ...]) -> str | None:
    if not os.path.isdir(root):
        return None
    there = {x.lower(): x for x in os.listdir(root) if os.path.isdir(os.path.join(root, x))}
    return next((os.path.join(root, there[name]) for name in names if name in there), None)


def _sample_of(paths: list[str]) -> dict[str, Counter[int]]:
    """The numbers of pixels by value in each of a sample of label maps; {} if the maps are in colour."""
    sample = {}
    for i in np.unique(np.linspace(0, len(paths) - 1, _SAMPLE).astype(int)):
        try:
            values, numbers = np.unique(read_labels(paths[i]), return_counts=True)
        except DataError:
            return {}
        sample[paths[i]] = Counter(dict(zip(values.tolist(), numbers.tolist())))
    return sample


def _meaning(shares: dict[int, float], keys: dict[str, Any], names: Sequence[str]) -> str:
    """What the values of label maps mean, with their shares of the pixels, where that was chosen here."""
    if "label_values" not in keys:
        return ""
    named = zip(keys["label_values"], keys["classes"], strict=True)
    listed = "; ".join(f"{value} is {name} ({shares[value]:.1%} of the pixels)" for value, name in named)
    return f": {listed}" + ("" if names else f". For other names, in this order: --names {','.join(keys['classes'])}")


def _semantic_classes(folder: str, sample: dict[str, Counter[int]], names: Sequence[str]) -> dict[str, Any]:
    """The keys of label maps: masks of two values, a file of class names, or made-up names.

    Args:
        sample: see :func:`_sample_of`.

    Raises:
        DataError: there are no names, and it is unclear whether 255 means pixels without a class; or as many names as
            values are needed.
    """
    values = sorted(set().union(*sample.values()))
    files = (os.path.join(folder, name) for name in ("classes.txt", "labels.txt"))
    file = next((path for path in files if os.path.isfile(path)), None)
    stated = class_names(file) if file else ["background", "object"]
    if len(values) == 2 == len(stated):
        return {"classes": _named(values, names) or stated, "label_values": values, "ignore": []}
    if file:
        return {"classes": file}
    _check_two_values(sample)
    known = [x for x in values if x != 255]
    if len(known) < len(values) and (not known or max(known) >= 2 * len(known)):
        raise DataError(
            f"{folder}: the masks have the values {', '.join(map(str, values))}. If these are numbers of classes, and "
            "255 is what has none, list the names of all classes in classes.txt. If they are shades of grey, such as "
            "255 for objects or soft edges, save masks with the numbers 0, 1, ...; or give label_values in a config."
        )
    return {"classes": _named(known, names) or [f"class_{x}" for x in known], "label_values": known}


def _check_two_values(sample: dict[str, Counter[int]]) -> None:
    """Refuse masks most of which have 0 and 255 alone, or the only ones that have 255: there it is an object.

    Raises:
        DataError: names those that do not go together.
    """
    black_white = [path for path, values in sample.items() if 255 in values and set(values) <= {0, 255}]
    others = {path: sorted(values) for path, values in sample.items() if not set(values) <= {0, 255}}
    if not black_white or not others or (len(black_white) <= len(others) and any(255 in x for x in others.values())):
        return
    listed = [
        f"{path} has {', '.join(map(str, x)) if len(x) < 4 else f'{len(x)} values'}" for path, x in others.items()
    ]
    raise DataError(
        f"{black_white[0]} and {len(black_white) - 1} more of {len(sample)} masks have the values 0 and 255 alone, but "
        f"{'; '.join(listed[:3])}{', and others' if len(listed) > 3 else ''}. Save all masks with the same two values, "
        "those that were resized without smoothing. If 255 is what has no class, list the classes in classes.txt."
    )


def _named(values: list[int], names: Sequence[str]) -> list[str]:
    if names and len(names) != len(values):
        raise DataError(
            f"--names {','.join(names)}: name the {len(values)} values of the masks, in this order: "
            f"{', '.join(map(str, values))}."
        )
    return list(names)
