"""YOLO's format for segmentation: one text file for each image, one object in each row."""

import os
from typing import Any

from ..files import image_size
from .builder import Builder, Place, read_text, rectangle

# Values beyond 0 and 1 by up to this much are rounding.
_ROUNDING = 0.01


def read_yolo(entry: dict[str, Any], builder: Builder) -> None:
    """Read "labels", a folder of text files with the paths of their images.

    Rows, whose first number is the index of the class in "classes":

    - "class x1 y1 x2 y2 x3 y3 ...": a polygon, as fractions of the width and the height of the image;
    - "class x y width height": a box by its centre, which is read as a rectangle;
    - "class rle height width counts": COCO's compressed run lengths.

    An image without a text file, or with an empty one, has no objects.
    """
    assert builder.classes is not None
    for stem, file_name in builder.image_files():
        path = os.path.join(entry["labels"], stem + ".txt")
        size = image_size(os.path.join(builder.root, file_name))
        image_id = builder.add_image(file_name, size)
        if not os.path.isfile(path):
            builder.notes.add("an image has no text file; read as an image without objects", file_name)
            continue
        seen = set()
        for number, row in enumerate(read_text(path).splitlines(), 1):
            words, where = row.split(), Place(path, f"line {number}")
            if not words:
                continue
            if tuple(words) in seen:
                builder.notes.add("a row occurs twice; read once", str(where))
                continue
            seen.add(tuple(words))
            try:
                index = int(float(words[0]))
                if not 0 <= index < len(builder.classes) or index != float(words[0]):
                    raise ValueError(f"its class {words[0]} is not one of the {len(builder.classes)} classes from 0")
                segmentation = _segmentation(words[1:], size, builder, where)
            except (ValueError, OverflowError) as error:
                builder.error(where, error)
                continue
            builder.add_object(image_id, builder.classes[index], segmentation, where)


def _segmentation(words: list[str], size: tuple[int, int], builder: Builder, where: Place) -> Any:
    height, width = size
    if words[:1] == ["rle"]:
        if len(words) != 4:
            raise ValueError("a row of run lengths must be: class rle height width counts")
        stated = [int(x) for x in words[1:3]]
        if stated != [height, width]:
            raise ValueError(f"the run lengths are of {stated} pixels (height, width), the image of {[height, width]}")
        return {"size": stated, "counts": words[3]}
    numbers = [float(x) for x in words]
    if len(numbers) % 2 or len(numbers) < 4:
        raise ValueError(f"the row has {len(numbers)} numbers behind the class: use pairs of x and y, at least 3")
    if not all(-_ROUNDING <= x <= 1 + _ROUNDING for x in numbers):
        wrong = next(x for x in numbers if not -_ROUNDING <= x <= 1 + _ROUNDING)
        raise ValueError(f"the coordinate {wrong} is not a fraction of the image from 0 to 1")
    if len(numbers) == 4:
        builder.notes.add("a row is a box and not a polygon; read as a rectangle", str(where))
        x, y, w, h = numbers
        return rectangle((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
    numbers = [min(max(x, 0.0), 1.0) for x in numbers]
    return [[x * (height if i % 2 else width) for i, x in enumerate(numbers)]]
