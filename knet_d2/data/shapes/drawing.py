"""Draws one image of the shapes data set: textured things that overlap, on a background of textured stuff.

All random numbers come from one generator, so (seed, index) determines an image. Lengths are given for an image of
128 x 128 pixels and scale with the image size. The outline of a thing shows its class, and the texture of a stuff
region shows its class. The hue shows the class, too, except in a few objects that have a random hue.
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
# A thing is kept only if this part of its area and this many pixels (at 128 x 128) stay visible.
_MIN_VISIBLE_PART, _MIN_VISIBLE_AREA = 0.35, 50
_UNLABELLED = -1
# The part of things and stuff regions that have a random hue instead of the hue of their class.
_ODD_HUES = 0.05
RIM_BRIGHTNESS = (0.45, 0.7)


class Thing(NamedTuple):
    """One thing or one crowd of things.

    Attributes:
        category: index of the class in THING_CLASSES.
        mask: visible pixels, bool [H, W].
        polygon: flat list x0, y0, x1, y1, ... if the polygon covers exactly the mask, else None.
        occlusion: part of the area inside the image that other things hide, 0 to 1.
        iscrowd: whether this is a crowd.
    """

    category: int
    mask: np.ndarray
    polygon: list | None
    occlusion: float
    iscrowd: bool


class Scene(NamedTuple):
    """A drawn image and its ground truth.

    Attributes:
        image: uint8 RGB [H, W, 3].
        things: list of Thing from the lowest to the topmost.
        stuff: index of the stuff class, int [H, W]; -1 for unlabelled pixels and pixels of things.
    """

    image: np.ndarray
    things: list
    stuff: np.ndarray


class _Shape(NamedTuple):
    category: int
    mask: np.ndarray
    polygon: list | None


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw a random scene of size x size pixels."""
    image, stuff = draw_stuff(rng, size)
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


def draw_stuff(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw regions with wavy borders, each with a texture; returns a float image [H, W, 3] and a class map [H, W]."""
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
    """Mix two colours of low saturation by the pattern of the class, or by a plain slope for unlabelled regions."""
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
    """Place shapes, from the lowest to the topmost, and the members of a crowd below all of them (None: no crowd)."""
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
    """Place a shape at a random position; with probability 1/2 close to another shape, so that the two overlap."""
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
    corners = outline(THING_CLASSES[category]) * (diameter / 2)
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (corners @ rotation.T + center).round(2)
    polygon = corners.reshape(-1).tolist()
    mask = mask_util.decode(mask_util.frPyObjects([polygon], size, size))[..., 0].astype(bool)
    inside = corners.min() >= 0 and corners.max() <= size
    return _Shape(category, mask, polygon if inside else None)


def outline(name: str) -> np.ndarray:
    """Return the corners [P, 2] of a shape in the unit circle."""
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
    """Return the visible part of each shape, and of the crowd as one thing, in drawing order."""
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
    texture = thing_texture(rng, len(mask), category)
    paint(image, mask, texture, rng.uniform(*RIM_BRIGHTNESS))


def thing_texture(rng: np.random.Generator, size: int, category: int) -> np.ndarray:
    """A saturated colour with a weak texture of no class, float [size, size, 3]."""
    hue = _class_hue(rng, category / len(THING_CLASSES))
    color = _color(hue, rng.uniform(0.55, 0.95), rng.uniform(0.6, 1.0))
    texture = (_slope, _stripes, _noise)[rng.integers(3)]
    shade = 1 - rng.uniform(0.1, 0.3) * texture(rng, size)
    return color * shade[..., None]


def paint(image: np.ndarray, mask: np.ndarray, texture: np.ndarray, rim_brightness: float) -> None:
    """Fill mask [H, W] of an image with a texture [H, W, 3], and darken its rim."""
    image[mask] = texture[mask]
    padded = np.pad(mask, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    image[mask & ~core] *= rim_brightness


def _class_hue(rng: np.random.Generator, typical: float) -> float:
    return rng.random() if rng.random() < _ODD_HUES else typical + rng.normal(0, 0.05)


def _rotated_axes(size: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates [H, W] along and across a direction, with 0 at the centre of the image."""
    y, x = np.mgrid[:size, :size].astype(np.float32) - size / 2
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _smooth_noise(rng: np.random.Generator, size: int, grain: float) -> np.ndarray:
    """Return smooth random values in [0, 1], float32 [H, W], with about ``grain`` pixels (at 128 x 128) per feature."""
    cells = max(2, round(_REFERENCE_SIZE / grain))
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)
