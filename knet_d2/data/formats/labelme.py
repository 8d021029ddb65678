"""labelme's format: one JSON file for each image."""

import base64
import binascii
import io
import math
import os
import re
from typing import Any

import numpy as np
from PIL import Image

from ...errors import DataError
from ..coco_json import decode_json
from ..files import ARRAY_TYPE, IMAGE_TYPES, MAX_PIXELS, files_below
from .builder import Builder, Place, ellipse, flat, read_text, rectangle


def read_labelme(entry: dict[str, Any], builder: Builder) -> None:
    """Read "annotations", a folder of JSON files; "images" is the folder of the images if it is another one.

    Shapes of an image with the same label and group_id are parts of one object. An image without a JSON file is left
    out; one whose JSON has no shapes is an image without objects.
    """
    root = entry["annotations"]
    files = list(files_below(root, (".json",)))
    if not files:
        raise DataError(f"{root}: this folder has no JSON files of labelme. Correct the path in DATASETS.CUSTOM.")
    known = set()
    for stem, path in files:
        content = decode_json(read_text(path), path)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            raise DataError(f"{path}: is not a file of labelme, which has a list 'shapes'. Remove or correct it.")
        file_name = _image_file(builder.root, stem, content.get("imagePath"))
        known.add(os.path.join(builder.root, file_name))
        height, width = content.get("imageHeight"), content.get("imageWidth")
        is_size = type(height) is int and type(width) is int and height > 0 and 0 < height * width <= MAX_PIXELS
        size = (height, width) if is_size else None
        image_id = builder.add_image(file_name, size)
        for (name, _), shapes in _objects(content["shapes"]).items():
            where = Place(path, f"shapes[{shapes[0][0]}] ({name})")
            try:
                if not name:
                    raise ValueError("has no label, which names its class")
                parts = [_part(shape, size) for _, shape in shapes]
                if any(isinstance(x, np.ndarray) for x in parts):
                    if len(parts) > 1:
                        raise ValueError("a mask can't be in a group with other shapes")
                    builder.add_object(image_id, name, parts[0], where)
                else:
                    builder.add_object(image_id, name, [x for part in parts for x in part], where)
            except (ValueError, TypeError, KeyError, OverflowError, OSError, binascii.Error) as error:
                builder.error(where, f"lacks {error}" if isinstance(error, KeyError) else error)
    for _, path in files_below(builder.root, (*IMAGE_TYPES, ARRAY_TYPE)):
        if path not in known:
            builder.notes.add("an image has no JSON file; left out", path)


def _objects(shapes: list[Any]) -> dict[tuple, list[tuple[int, dict]]]:
    """Group the shapes to objects: (label, its group or number) -> (number, shape) of each part."""
    objects: dict[tuple, list[tuple[int, dict]]] = {}
    for number, shape in enumerate(shapes):
        shape = shape if isinstance(shape, dict) else {}
        group, label = shape.get("group_id"), shape.get("label")
        name = str(label).strip() if type(label) in (str, int) else ""
        key = ("group", str(group)) if group is not None else ("shape", str(number))
        objects.setdefault((name, key), []).append((number, shape))
    return objects


def _image_file(root: str, stem: str, stated: Any) -> str:
    """Find the image of a JSON file, as a path below root.

    It is in the folder of the JSON, with the stated name or else with the name of the JSON. If there is no such file,
    the first of these names is returned, so that reading the image names it.
    """
    folder = os.path.dirname(stem)
    names = [re.split(r"[\\/]", stated)[-1]] if isinstance(stated, str) and stated else []
    names += [os.path.basename(stem) + ending for ending in (*IMAGE_TYPES, ARRAY_TYPE)]
    for name in names:
        if os.path.isfile(os.path.join(root, folder, name)):
            return os.path.join(folder, name)
    return os.path.join(folder, names[0])


def _part(shape: dict[str, Any], size: tuple[int, int] | None) -> Any:
    """Polygons, or a mask of the whole image."""
    points, kind = flat(shape["points"]), shape.get("shape_type") or "polygon"
    if kind in ("polygon", "linestrip"):
        return [points]
    if kind == "rectangle":
        (x0, x1), (y0, y1) = sorted(points[0::2]), sorted(points[1::2])
        return rectangle(x0, y0, x1 - x0, y1 - y0)
    if kind == "circle":
        x, y, x1, y1 = points
        radius = math.hypot(x1 - x, y1 - y)
        return ellipse(x, y, radius, radius)
    if kind == "mask":
        if size is None:
            raise ValueError("a mask needs imageHeight and imageWidth")
        content = base64.b64decode(shape["mask"])
        image = Image.open(io.BytesIO(content), formats=("PNG",))
        if image.width > size[1] or image.height > size[0]:  # the header alone has been read so far
            raise ValueError("the mask is larger than the image")
        crop = np.asarray(image.convert("L")) > 0
        left, top = (round(min(points[i::2])) for i in (0, 1))
        mask = np.zeros(size, bool)
        if left < 0 or top < 0 or top + crop.shape[0] > size[0] or left + crop.shape[1] > size[1]:
            raise ValueError("the mask reaches beyond the image")
        mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        return mask
    raise ValueError(f"the shape_type {kind!r} has no area; use polygon, rectangle, circle or mask")
