"""The VGG Image Annotator's format, versions 1 and 2: exports as JSON and CSV, and saved projects."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ...errors import DataError
from ..coco_json import decode_json
from .builder import Builder, Place, ellipse, flat, read_text, rectangle

csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is less than a polygon may have


def read_via(entry: dict[str, Any], builder: Builder) -> None:
    """Read "annotations", a JSON or CSV file.

    The class of a region is the value of the attribute "attribute"; by default of the one that most regions have. Where
    no region has attributes, all are of one class.
    """
    path = entry["annotations"]
    text = read_text(path)
    images = dict(_csv_images(text, path) if path.lower().endswith(".csv") else _json_images(text, path))
    regions = [region for of_image in images.values() for region in of_image]
    attribute = entry.get("attribute") or _class_attribute(regions)
    for file_name, of_image in images.items():
        image_id = builder.add_image(file_name)
        for number, (shape, attributes) in enumerate(of_image):
            where = Place(path, f"{file_name}, region {number}")
            try:
                polygons = _polygons(shape)
                name = None if attribute is None else _value(attributes, attribute)
                builder.add_object(image_id, name, polygons, where)
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                builder.error(where, f"lacks {error}" if isinstance(error, KeyError) else error)


# An image as (file name, [(shape attributes, region attributes), ...])
_Image = tuple[str, list[tuple[Any, Any]]]


def _json_images(text: str, path: str) -> Iterator[_Image]:
    content = decode_json(text, path)
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)  # a saved project
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(x, dict) and isinstance(x.get("filename"), str) for x in content.values())
    ):
        raise DataError(f"{path}: is not an export of VIA 1 or 2. Export the annotations as JSON or CSV.")
    for image in content.values():
        regions = image.get("regions") or []
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        if not isinstance(regions, list):
            raise DataError(f"{path}: the regions of {image['filename']} are no list. Export the annotations again.")
        found = [x if isinstance(x, dict) else {} for x in regions]  # {} becomes the error "has no shape"
        yield image["filename"], [(x.get("shape_attributes"), x.get("region_attributes")) for x in found]


def _csv_images(text: str, path: str) -> Iterator[_Image]:
    rows = csv.DictReader(io.StringIO(text))
    names = {(name or "").lstrip("#"): name for name in rows.fieldnames or ()}
    missing = {"filename", "region_shape_attributes", "region_attributes"} - set(names)
    if missing:
        raise DataError(
            f"{path}: lacks the column {sorted(missing)[0]}, so it is not an export of VIA. Export it again."
        )
    images: dict[str, list[tuple[Any, Any]]] = {}
    for row in _rows(rows, path):
        of_image = images.setdefault(row[names["filename"]], [])
        shape, attributes = (
            decode_json(row[names[key]] or "{}", f"{path}:{rows.line_num}")
            for key in ("region_shape_attributes", "region_attributes")
        )
        if shape:  # an image without regions has one row without a shape
            of_image.append((shape, attributes))
    yield from images.items()


def _rows(rows: csv.DictReader, path: str) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num} is not valid CSV ({error}). Export it again.") from error


def _class_attribute(regions: list[tuple[Any, Any]]) -> str | None:
    """The attribute that most regions have; of several, the first. None if no region has attributes."""
    counts = Counter(key for _, attributes in regions if isinstance(attributes, dict) for key in attributes)
    return counts.most_common(1)[0][0] if counts else None


def _value(attributes: Any, attribute: str) -> str:
    """The class of a region: text, or the one option of a check box or radio button that is chosen."""
    value = attributes.get(attribute) if isinstance(attributes, dict) else None
    if isinstance(value, dict):
        chosen = [key for key, is_chosen in value.items() if is_chosen]
        value = chosen[0] if len(chosen) == 1 else None
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"the attribute {attribute!r}, which names the class, is {value!r}; choose one value")
    return str(value).strip()


def _polygons(shape: Any) -> list[list[float]]:
    if not isinstance(shape, dict):
        raise ValueError("has no shape")
    kind = shape.get("name")
    if kind in ("polygon", "polyline"):
        return [flat(zip(shape["all_points_x"], shape["all_points_y"], strict=True))]
    if kind == "rect":
        return rectangle(*(float(shape[key]) for key in ("x", "y", "width", "height")))
    if kind == "circle":
        x, y, r = (float(shape[key]) for key in ("cx", "cy", "r"))
        return ellipse(x, y, r, r)
    if kind == "ellipse":
        x, y, rx, ry = (float(shape[key]) for key in ("cx", "cy", "rx", "ry"))
        return ellipse(x, y, rx, ry, float(shape.get("theta", 0)))
    raise ValueError(f"the shape {kind!r} has no area; use polygon, rect, circle or ellipse")
