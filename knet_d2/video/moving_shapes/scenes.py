"""Draws the videos of moving shapes: the things and stuff of the data set shapes, in motion before a moving camera.

In each video one pair of things passes behind each other twice, fast: look-alikes of one class that move by more than
half their size in a frame. Two pairs of different classes cross once, slowly. So half of all crossings are between
look-alikes. The fast pair also leaves the image and returns. One more thing turns, grows and shrinks.

(seed, index) determines a video. Lengths are given for an image of 128 x 128 pixels and scale with the size.
"""

import math
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from ...data.shapes.drawing import (
    RIM_BRIGHTNESS,
    STUFF_CLASSES,
    THING_CLASSES,
    draw_stuff,
    outline,
    paint,
    thing_texture,
)

_REFERENCE_SIZE = 128
# Part of the image's size that the background reaches beyond each side, and by which the camera moves at most
_MARGIN = 0.2
# Things of fewer visible pixels (at 128 x 128) are not labelled
_MIN_VISIBLE_AREA = 12
UNLABELLED = -1


class Frame(NamedTuple):
    """A frame and its ground truth.

    Attributes:
        image: uint8 RGB [H, W, 3].
        things: {track: visible pixels, bool [H, W]}.
        stuff: index of the stuff class, int [H, W]; UNLABELLED for void and for the pixels of things.
    """

    image: np.ndarray
    things: dict[int, np.ndarray]
    stuff: np.ndarray


class Crossing(NamedTuple):
    """Two things pass each other.

    Attributes:
        time: in frames, between two frames or at one.
        tracks: both.
        look_alike: whether both are of one class and look alike, and move by more than half their size in a frame.
    """

    time: float
    tracks: tuple[int, int]
    look_alike: bool


class Video(NamedTuple):
    """A drawn video.

    Attributes:
        categories: {track: index of the class in THING_CLASSES}; tracks count from 1, the lowest thing first.
        crossings: in the order of time.
        frames: in the order of time.
    """

    categories: dict[int, int]
    crossings: list[Crossing]
    frames: list[Frame]


class _Thing(NamedTuple):
    """How a thing looks and moves; lengths in pixels.

    Attributes:
        texture: float [H, W, 3], of which the thing covers a disk around the centre.
        centers: [frames, 2], (x, y) in the world.
        diameters, angles: [frames].
    """

    category: int
    texture: np.ndarray
    rim_brightness: float
    centers: np.ndarray
    diameters: np.ndarray
    angles: np.ndarray


def draw_video(rng: np.random.Generator, num_frames: int, size: int) -> Video:
    """Draw a random video of num_frames frames of size x size pixels."""
    margin = round(_MARGIN * size)
    world, stuff = draw_stuff(rng, size + 2 * margin)
    camera = _camera_path(rng, num_frames, margin)
    things, crossings = _place_things(rng, num_frames, size)
    noise_seed = int(rng.integers(2**32))
    frames = []
    for t in range(num_frames):
        x, y = camera[t]
        window = slice(y, y + size), slice(x, x + size)
        image, labels = world[window].copy(), stuff[window].copy()
        masks = [_draw_thing(image, thing, t, camera[t] - margin) for thing in things]
        image += np.random.default_rng([noise_seed, t]).normal(0, 0.015, image.shape).astype(np.float32)
        labels[np.any(masks, axis=0)] = UNLABELLED
        visible = _visible(masks, _MIN_VISIBLE_AREA * (size / _REFERENCE_SIZE) ** 2)
        frames.append(Frame((np.clip(image, 0, 1) * 255).round().astype(np.uint8), visible, labels))
    return Video({i: thing.category for i, thing in enumerate(things, 1)}, sorted(crossings), frames)


def _camera_path(rng: np.random.Generator, num_frames: int, margin: int) -> np.ndarray:
    """(x, y) of the image's corner in the world of each frame, int [frames, 2]: a slow oscillation on each axis."""
    t = np.arange(num_frames)[:, None]
    periods, phases = rng.uniform(25, 60, 2), rng.uniform(0, 2 * np.pi, 2)
    return (margin * (1 + rng.uniform(0.3, 1, 2) * np.sin(2 * np.pi * t / periods + phases))).round().astype(int)


def _place_things(rng: np.random.Generator, num_frames: int, size: int) -> tuple[list[_Thing], list[Crossing]]:
    """The things from the lowest to the topmost, and their crossings."""
    scale, t = size / _REFERENCE_SIZE, np.arange(num_frames)
    pairs = []
    for look_alike in rng.permutation([True, False, False]).tolist():
        diameter, direction = rng.uniform(20, 30) * scale, _direction(rng)
        middle = rng.uniform(0.35, 0.65, 2) * size
        distance: np.ndarray
        if look_alike:
            # Back and forth on a line: a triangle wave whose crossings are half the video apart
            apart = num_frames / 2
            step = rng.uniform(0.55, 0.75) * diameter
            times = [rng.uniform(0.2, 0.8) * apart]
            times.append(times[0] + apart)
            wave = 2 * np.abs(((t - times[0]) / apart - 0.5) % 2 - 1) - 1  # from -1 to 1, 0 at the crossings
            distance = step * apart / 2 * wave
        else:
            step = rng.uniform(0.1, 0.2) * diameter
            times = [rng.uniform(0.2, 0.8) * num_frames]
            distance = step * (t - times[0])
        sideways = rng.uniform(-0.15, 0.15) * diameter * direction[::-1] * [1, -1]
        first = int(rng.integers(len(THING_CLASSES)))
        second = first if look_alike else (first + int(rng.integers(1, len(THING_CLASSES)))) % len(THING_CLASSES)
        appearance = int(rng.integers(2**32))
        pair = []
        for side, category in ((1, first), (-1, second)):
            # Look-alikes have the same colour and texture, and differ in size a little
            look = np.random.default_rng(appearance) if look_alike else rng
            centers = middle + side * (distance[:, None] * direction + sideways)
            diameters = np.full(num_frames, diameter * (1 + 0.1 * side if look_alike else rng.uniform(0.8, 1.2)))
            pair.append(_thing(look, size, category, centers, diameters, _turning(rng, t)))
        pairs.append((pair, times, look_alike))
    diameter = rng.uniform(18, 34) * scale
    centers = rng.uniform(0.15, 0.85, 2) * size + rng.uniform(0, 1.5) * scale * t[:, None] * _direction(rng)
    diameters = diameter * (1 + 0.3 * np.sin(2 * np.pi * t / rng.uniform(12, 30)))
    lone = _thing(rng, size, int(rng.integers(len(THING_CLASSES))), centers, diameters, _turning(rng, t))
    order = rng.permutation(2 * len(pairs) + 1)  # of the things, from the lowest to the topmost
    tracks = np.argsort(order) + 1
    things = [*(thing for pair, _, _ in pairs for thing in pair), lone]
    crossings = [
        Crossing(time, (int(tracks[2 * i]), int(tracks[2 * i + 1])), look_alike)
        for i, (_, times, look_alike) in enumerate(pairs)
        for time in times
    ]
    return [things[i] for i in order], crossings


def _thing(
    rng: np.random.Generator,
    size: int,
    category: int,
    centers: np.ndarray,
    diameters: np.ndarray,
    angles: np.ndarray,
) -> _Thing:
    texture = thing_texture(rng, size, category)
    return _Thing(category, texture, rng.uniform(*RIM_BRIGHTNESS), centers, diameters, angles)


def _direction(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([math.cos(angle), math.sin(angle)])


def _turning(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    return rng.uniform(0, 2 * np.pi) + rng.uniform(-0.15, 0.15) * t


def _draw_thing(image: np.ndarray, thing: _Thing, t: int, camera: np.ndarray) -> np.ndarray:
    """Draw a thing into a frame (in place); returns its mask, also where other things will cover it."""
    size = len(image)
    center, diameter, angle = thing.centers[t] - camera, thing.diameters[t], thing.angles[t]
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    corners = outline(THING_CLASSES[thing.category]) * (diameter / 2) @ rotation.T + center
    rle = mask_util.frPyObjects([corners.reshape(-1).tolist()], size, size)
    mask = mask_util.decode(rle)[..., 0].astype(bool)
    if mask.any():
        # The transform from the frame to the texture rotates back around the centres
        back = rotation.T
        offset = size / 2 - back @ center
        coefficients = (back[0, 0], back[0, 1], offset[0], back[1, 0], back[1, 1], offset[1])
        channels = [
            Image.fromarray(thing.texture[..., i].astype(np.float32)).transform(
                (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
            )
            for i in range(3)
        ]
        paint(image, mask, np.stack([np.asarray(x) for x in channels], axis=-1), thing.rim_brightness)
    return mask


def _visible(masks: list[np.ndarray], min_area: float) -> dict[int, np.ndarray]:
    """The visible parts by track, without those of few pixels."""
    visible, covered = {}, np.zeros_like(masks[0])
    for track in range(len(masks), 0, -1):
        part = masks[track - 1] & ~covered
        covered |= masks[track - 1]
        if part.sum() >= min_area:
            visible[track] = part
    return dict(sorted(visible.items()))


__all__ = ["STUFF_CLASSES", "THING_CLASSES", "UNLABELLED", "Crossing", "Frame", "Video", "draw_video"]
