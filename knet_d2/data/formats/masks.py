"""Formats that hold masks as PNG files."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...errors import DataError
from ..files import color_code, files_below, read_colors, read_labels
from .builder import ONE_CLASS, Builder, Place, class_names, read_text

# Most objects in one PNG. A photo in place of the PNG has more values than this.
_MOST_OBJECTS = 20_000
# Colour of the border of objects in Pascal VOC
_BORDER = (224, 224, 192)
_VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_BACKGROUND = ("background", "_background_")


def read_instance_png(entry: dict[str, Any], builder: Builder) -> None:
    """Read "masks", a folder with one PNG for each image, of the same path: 0 is no object, others number objects.

    With "class_divisor" D a value is D times the number of the class, from 1, plus the number of the object. Without
    it, all objects are of one class.
    """
    divisor = entry.get("class_divisor")
    if builder.classes is None:
        builder.classes = [ONE_CLASS]
    if divisor is None and len(builder.classes) > 1:
        raise DataError(f"{entry['masks']}: several classes need 'class_divisor'; see knet docs DATASETS.")
    for file_name, path in _paired(builder, entry["masks"]):
        image_id, labels = builder.add_image(file_name), read_labels(path)
        values = np.unique(labels[labels > 0]).tolist()
        if len(values) > _MOST_OBJECTS:
            builder.error(Place(path), f"has {len(values)} values, so it does not number objects")
            continue
        for value in values:
            number = 1 if divisor is None else value // max(divisor, 1)
            where = Place(path, f"value {value}")
            if not 1 <= number <= len(builder.classes):
                builder.error(where, f"its class {number} is not one of the {len(builder.classes)} classes")
                continue
            builder.add_object(image_id, builder.classes[number - 1], labels == value, where)


def read_png_per_instance(entry: dict[str, Any], builder: Builder) -> None:
    """Read "masks", a folder with one PNG for each object; pixels above half of the largest value are the object.

    The masks of an image NAME are in a folder NAME, in which folders may name the classes (NAME/CLASS/*.png), or are
    files NAME_*.png. Images in a folder "images" may also have their masks in a folder "masks" beside it, one image in
    each; then "images" and "masks" of the entry are the same folder.
    """
    root = entry["masks"]
    if not os.path.isdir(root):
        raise DataError(f"{root}: this folder of masks does not exist. Correct the path in DATASETS.CUSTOM.")
    images = {x: file for x, file in builder.image_files() if os.path.basename(os.path.dirname(x)) != "masks"}
    of_folder = {re.sub(r"(^|/)images$", r"\1masks", os.path.dirname(x)): x for x in images}
    of_image: dict[str, list[tuple[str | None, str]]] = {x: [] for x in images}
    for stem, path in files_below(root, (".png",)):
        owner, name = _owner(stem, images, of_folder)
        if owner is not None:
            of_image[owner].append((name or None, path))
        elif os.path.realpath(path) not in {os.path.realpath(os.path.join(builder.root, x)) for x in images.values()}:
            builder.error(Place(path), f"is the mask of no image in {builder.root}")
    for stem, file_name in images.items():
        if not of_image[stem]:
            builder.notes.add("an image has no masks; read as an image without objects", file_name)
        image_id = builder.add_image(file_name)
        for name, path in of_image[stem]:
            values = read_labels(path)
            builder.add_object(image_id, name, values > values.max() / 2, Place(path))


def _owner(mask: str, images: Mapping[str, str], of_folder: Mapping[str, str]) -> tuple[str | None, str]:
    """Find the image that a mask belongs to (None: there is none), and the folders that name the mask's class.

    Args:
        mask: path of the mask below its folder, without ending.
        images: keys are the images' paths without ending.
        of_folder: folder of masks -> the one image whose masks are there.
    """
    *folders, name = mask.split("/")
    for i in range(len(folders), 0, -1):
        folder = "/".join(folders[:i])
        if folder in images or (folders[i - 1] == "masks" and folder in of_folder):
            return (folder if folder in images else of_folder[folder]), "/".join(folders[i:])
    places = [match.start() for match in re.finditer("_", name)][::-1]
    stems = ("/".join([*folders, name[:place]]) for place in places)
    return next((x for x in stems if x in images), None), ""


def read_voc(entry: dict[str, Any], builder: Builder) -> None:
    """Read "root", a folder with JPEGImages, SegmentationClass and SegmentationObject, as Pascal VOC and CVAT write.

    "labelmap.txt" in it, which CVAT writes, names the classes and their colours; otherwise the classes are those of
    "classes" or of Pascal VOC, with Pascal VOC's colours. "list" is a text file of the images to read; default: all.
    """
    root = entry["root"]
    table = color_table(root, entry.get("classes"))
    builder.classes = [name for name in table if name not in _BACKGROUND]
    objects = dict(files_below(os.path.join(root, "SegmentationObject"), (".png",)))
    classes = dict(files_below(os.path.join(root, "SegmentationClass"), (".png",)))
    if not objects:
        raise DataError(f"{root}: has no PNGs in SegmentationObject, which hold the objects. Correct the path.")
    listed = None
    if "list" in entry:
        listed = {line.split()[0] for line in read_text(entry["list"]).splitlines() if line.strip()}
    names = {color_code(color): name for name, color in table.items()}
    for stem, file_name in builder.image_files():
        if stem not in objects or (listed is not None and stem not in listed):
            continue
        if stem not in classes:
            raise DataError(f"{os.path.join(root, 'SegmentationClass', stem)}.png does not exist. Add it.")
        image_id = builder.add_image(file_name)
        numbers, kinds = read_colors(objects[stem]), read_colors(classes[stem])
        if numbers.shape != kinds.shape:
            builder.error(Place(objects[stem]), f"has another size than {classes[stem]}")
            continue
        found = np.unique(numbers[(numbers != 0) & (numbers != color_code(_BORDER))]).tolist()
        if len(found) > _MOST_OBJECTS:
            builder.error(Place(objects[stem]), f"has {len(found)} colours, so these are not those of objects")
            continue
        for number in found:
            mask = numbers == number
            values, counts = np.unique(kinds[mask], return_counts=True)
            color = int(values[counts.argmax()])
            where = Place(objects[stem], f"object of colour {_rgb(number)}")
            name = names.get(color)
            if name is None or name in _BACKGROUND:
                builder.error(where, f"its colour {_rgb(color)} in {classes[stem]} is of no class")
                continue
            builder.add_object(image_id, name, mask, where)


def color_table(root: str, classes: Any) -> dict[str, tuple[int, int, int]]:
    """The colours of the classes of a folder in Pascal VOC's layout, with "background" at black."""
    path = os.path.join(root, "labelmap.txt")
    if classes is None and os.path.isfile(path):
        return read_labelmap(path)
    names = [x for x in (_VOC_CLASSES if classes is None else class_names(classes)) if x not in _BACKGROUND]
    return {name: voc_color(i) for i, name in enumerate(["background", *names])}


def read_labelmap(path: str) -> dict[str, tuple[int, int, int]]:
    """Read CVAT's labelmap.txt: rows "name:red,green,blue:parts:actions".

    Raises:
        DataError: a row is of another form.
    """
    table = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, color, *_ = line.split(":")
            red, green, blue = (int(x) for x in color.split(","))
        except ValueError:
            raise DataError(f"{path}:{number}: is {line[:60]!r}. Write it as name:red,green,blue::") from None
        table[name.strip()] = (red, green, blue)
    return table


def voc_color(index: int) -> tuple[int, int, int]:
    """The colour of a class in Pascal VOC: the bits of its number, spread over the channels from the highest bit."""
    color = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            color[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return color[0], color[1], color[2]


def _rgb(code: int) -> tuple[int, int, int]:
    return int(code) >> 16, int(code) >> 8 & 255, int(code) & 255


def _paired(builder: Builder, root: str) -> Iterable[tuple[str, str]]:
    """Yield the file name of each image and the path of its PNG; images without a PNG become errors of the builder."""
    files = dict(files_below(root, (".png",)))
    if not files:
        raise DataError(f"{root}: this folder has no PNGs. Correct the path in DATASETS.CUSTOM.")
    for stem, file_name in builder.image_files():
        if stem in files:
            yield file_name, files[stem]
        else:
            builder.error(Place(os.path.join(builder.root, file_name)), f"has no PNG {os.path.join(root, stem)}.png")
