"""Draws one image of the shapes data set: textured things that overlap, over textured stuff.

Everything is a function of one random generator, so that an image is determined by (seed, index). Lengths are
given for an image of 128 x 128 pixels and scale with the size. A thing's class is told by its outline, a stuff
class by its texture, and both by their colour mostly: a few have any hue, not that of their class.
"""

import colorsys
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

THING_CLASSES = ("circle", "square", "triangle", "star")
STUFF_CLASSES = ("stripes", "checker", "noise")
MAX_THINGS = 8
MIN_DIAMETER, MAX_DIAMETER = 18.0, 90.0
_REFERENCE_SIZE = 128
# A thing stays only where this part of its area and this many pixels (at 128 x 128) remain visible.
_MIN_VISIBLE_PART, _MIN_VISIBLE_AREA = 0.35, 50
_UNLABELLED = -1
# The part of things and stuff regions whose hue is not that of their class
_ODD_HUES = 0.05


class Thing(NamedTuple):
    """One thing or one crowd of things; mask is a bool array [H, W] of its visible pixels.

    polygon: flat list x0, y0, x1, y1, ... where the mask is exactly that polygon's, else None.
    occlusion: the part of its area inside the image that other things hide.
    """

    category: int
    mask: np.ndarray
    polygon: list | None
    occlusion: float
    iscrowd: bool


class Scene(NamedTuple):
    """image: uint8 RGB [H, W, 3]; things: from the lowest to the topmost; stuff: int [H, W], -1 where unlabelled."""

    image: np.ndarray
    things: list
    stuff: np.ndarray


class _Shape(NamedTuple):
    category: int
    mask: np.ndarray
    polygon: list | None


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw a random scene of size x size pixels."""
    image, stuff = _draw_stuff(rng, size)
    shapes, crowd = _place_shapes(rng, size)
    if crowd is not None:
        for member in crowd:
            _paint_thing(rng, image, member.mask, member.category)
    for shape in shapes:
        _paint_thing(rng, image, shape.mask, shape.category)
    image = image + rng.normal(0, 0.015, image.shape).astype(np.float32)
    things = _visible_things(shapes, crowd)
    for thing in things:
        stuff[thing.mask] = _UNLABELLED
    return Scene((np.clip(image, 0, 1) * 255).round().astype(np.uint8), things, stuff)


def _draw_stuff(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Regions with wavy borders, each with a texture: float image [H, W, 3] and class map [H, W]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    num_regions = rng.integers(1, 5)
    centers = rng.uniform(0, size, (num_regions, 2))
    wave = (_smooth_noise(rng, size, 40) - 0.5) * 0.3 * size
    wave2 = (_smooth_noise(rng, size, 40) - 0.5) * 0.3 * size
    distance = [(x + wave - cx) ** 2 + (y + wave2 - cy) ** 2 for cx, cy in centers]
    region = np.argmin(distance, axis=0)
    image = np.zeros((size, size, 3), np.float32)
    stuff = np.empty((size, size), np.int64)
    for i in range(num_regions):
        inside = region == i
        unlabelled = num_regions > 1 and rng.random() < 0.05
        category = _UNLABELLED if unlabelled else int(rng.integers(len(STUFF_CLASSES)))
        stuff[inside] = category
        image[inside] = _stuff_texture(rng, size, category)[inside]
    return image, stuff


def _stuff_texture(rng: np.random.Generator, size: int, category: int) -> np.ndarray:
    """Two colours of low saturation, mixed by the class's pattern; a plain slope where unlabelled."""
    hue = rng.random() if category == _UNLABELLED else _class_hue(rng, (category + 0.5) / len(STUFF_CLASSES))
    saturation = rng.uniform(0.15, 0.45)
    bright = rng.uniform(0.65, 0.95)
    dark = bright - rng.uniform(0.3, 0.5)
    first = _color(hue, saturation, bright)
    second = _color(hue + rng.uniform(-0.05, 0.05), saturation, dark)
    plain = category == _UNLABELLED
    weight = 0.3 * _slope(rng, size) if plain else _PATTERNS[STUFF_CLASSES[category]](rng, size)
    return first + (second - first) * weight[..., None]


def _slope(rng: np.random.Generator, size: int) -> np.ndarray:
    along = _rotated_axes(size, rng.uniform(0, 2 * np.pi))[0] / size
    return np.clip(along + 0.5, 0, 1)


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    period = rng.uniform(7, 13) * size / _REFERENCE_SIZE
    along = _rotated_axes(size, rng.uniform(0, np.pi))[0]
    return np.clip(0.5 + 1.5 * np.sin(2 * np.pi * along / period + rng.uniform(0, 6)), 0, 1)


def _checker(rng: np.random.Generator, size: int) -> np.ndarray:
    period = rng.uniform(14, 22) * size / _REFERENCE_SIZE
    u, v = _rotated_axes(size, rng.uniform(0, np.pi))
    phase = rng.uniform(0, 6, 2)
    waves = np.sin(2 * np.pi * u / period + phase[0]) * np.sin(2 * np.pi * v / period + phase[1])
    return np.clip(0.5 + 4 * waves, 0, 1)


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    grain = _smooth_noise(rng, size, rng.uniform(2.5, 4.5))
    return np.clip(0.5 + 1.5 * (grain - 0.5), 0, 1)


_PATTERNS = {"stripes": _stripes, "checker": _checker, "noise": _noise}


def _place_shapes(rng: np.random.Generator, size: int) -> tuple[list, list | None]:
    """Shapes from the lowest to the topmost, and the members of a crowd that lies below them (or None)."""
    crowd = _place_crowd(rng, size) if rng.random() < 0.12 else None
    num_things = 0 if rng.random() < 0.04 else int(rng.integers(1, MAX_THINGS + 1))
    shapes = []
    for _ in range(num_things):
        for _ in range(12):
            shape = _random_shape(rng, size, [s.mask for s in shapes])
            if _all_visible([*shapes, shape], size):
                shapes.append(shape)
                break
    return shapes, crowd


def _place_crowd(rng: np.random.Generator, size: int) -> list:
    scale = size / _REFERENCE_SIZE
    category = int(rng.integers(len(THING_CLASSES)))
    center = rng.uniform(0.2, 0.8, 2) * size
    offsets = rng.normal(0, 9 * scale, (int(rng.integers(8, 15)), 2))
    return [_shape(rng, size, category, center + offset, rng.uniform(7, 10) * scale) for offset in offsets]


def _random_shape(rng: np.random.Generator, size: int, others: list) -> _Shape:
    """A shape anywhere, or, half of the time, close to another one, so that they overlap."""
    diameter = np.exp(rng.uniform(np.log(MIN_DIAMETER), np.log(MAX_DIAMETER))) * size / _REFERENCE_SIZE
    margin = 0.25 * diameter
    center = rng.uniform(margin, size - margin, 2)
    if others and rng.random() < 0.5:
        rows, cols = np.nonzero(others[rng.integers(len(others))])
        pick = rng.integers(len(rows))
        center = np.array([cols[pick], rows[pick]]) + rng.normal(0, 0.4 * diameter, 2)
        center = np.clip(center, margin, size - margin)
    category = int(rng.integers(len(THING_CLASSES)))
    return _shape(rng, size, category, center, diameter)


def _shape(rng: np.random.Generator, size: int, category: int, center: np.ndarray, diameter: float) -> _Shape:
    corners = _outline(THING_CLASSES[category]) * (diameter / 2)
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (corners @ rotation.T + center).round(2)
    polygon = corners.reshape(-1).tolist()
    mask = mask_util.decode(mask_util.frPyObjects([polygon], size, size))[..., 0].astype(bool)
    inside = corners.min() >= 0 and corners.max() <= size
    return _Shape(category, mask, polygon if inside else None)


def _outline(name: str) -> np.ndarray:
    """Corners [P, 2] on and in the unit circle."""
    if name == "star":
        radius, count = np.tile([1.0, 0.42], 5), 10
    else:
        count = {"circle": 32, "square": 4, "triangle": 3}[name]
        radius = np.ones(count)
    angle = np.arange(count) * 2 * np.pi / count
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _all_visible(shapes: list, size: int) -> bool:
    min_area = _MIN_VISIBLE_AREA * (size / _REFERENCE_SIZE) ** 2
    covered = np.zeros((size, size), bool)
    for shape in reversed(shapes):
        visible = np.count_nonzero(shape.mask & ~covered)
        if visible < max(min_area, _MIN_VISIBLE_PART * np.count_nonzero(shape.mask)):
            return False
        covered |= shape.mask
    return True


def _visible_things(shapes: list, crowd: list | None) -> list[Thing]:
    """What remains visible of each shape, and of the crowd as one, in drawing order."""
    things = []
    covered = np.zeros_like(shapes[0].mask if shapes else crowd[0].mask) if shapes or crowd else None
    for shape in reversed(shapes):
        mask = shape.mask & ~covered
        occlusion = 1 - np.count_nonzero(mask) / np.count_nonzero(shape.mask)
        polygon = shape.polygon if occlusion == 0 else None
        things.append(Thing(shape.category, mask, polygon, float(occlusion), iscrowd=False))
        covered |= shape.mask
    if crowd is not None:
        whole = np.any([member.mask for member in crowd], axis=0)
        mask = whole & ~covered
        if mask.any():
            occlusion = 1 - np.count_nonzero(mask) / np.count_nonzero(whole)
            things.append(Thing(crowd[0].category, mask, None, float(occlusion), iscrowd=True))
    return things[::-1]


def _paint_thing(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, category: int) -> None:
    """Fill mask [H, W] with a saturated colour, a weak texture that says nothing of the class, and a dark rim."""
    size = len(mask)
    hue = _class_hue(rng, category / len(THING_CLASSES))
    color = _color(hue, rng.uniform(0.55, 0.95), rng.uniform(0.6, 1.0))
    texture = (_slope, _stripes, _noise)[rng.integers(3)]
    shade = 1 - rng.uniform(0.1, 0.3) * texture(rng, size)
    image[mask] = color * shade[mask][:, None]
    padded = np.pad(mask, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    image[mask & ~core] *= rng.uniform(0.45, 0.7)


def _class_hue(rng: np.random.Generator, typical: float) -> float:
    return rng.random() if rng.random() < _ODD_HUES else typical + rng.normal(0, 0.05)


def _rotated_axes(size: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [H, W] along and across a direction, 0 at the centre."""
    y, x = np.mgrid[:size, :size].astype(np.float32) - size / 2
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _smooth_noise(rng: np.random.Generator, size: int, grain: float) -> np.ndarray:
    """Random values in [0, 1] that change over about grain pixels (at 128 x 128): float32 [H, W]."""
    cells = max(2, round(_REFERENCE_SIZE / grain))
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)
