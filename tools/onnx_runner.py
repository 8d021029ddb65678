#!/usr/bin/env python
"""Segment images with an exported K-Net. It needs numpy, onnxruntime and OpenCV, and nothing else of this project.

    python onnx_runner.py model.onnx photo.jpg --output drawn.png
    python onnx_runner.py model.onnx video.mp4 --video --output drawn.mp4

As a module: OnnxRunner(path)(image) gives the segments of an image, colours in BGR order.
OnnxTracker(OnnxRunner(path)) is called with the frames of a video one by one, and gives segments with track ids. It
needs one more file, knet_d2/video/tracker.py, at its place in this project or beside this file.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

# Bits behind the point in Pillow's weights
_PRECISION = 22
# Lowest and highest value of an image's type, where the model's file names none
_TYPE_RANGES = {"uint8": (0, 255), "uint16": (0, 65535), "float16": (0, 1), "float32": (0, 1), "float64": (0, 1)}
# Weights of blue, green and red in a grey value, parts of 65536
_LUMINANCE = (7471, 38470, 19595)


class Segment(NamedTuple):
    """One object, stuff region or semantic class.

    Attributes:
        category_id, name: of its class.
        score: None for semantic segmentation.
        mask: bool [height, width] of the image.
        track_id: the same for one object in all frames of a video; None for images.
    """

    category_id: int
    name: str
    score: float | None
    mask: np.ndarray
    track_id: int | None = None


class OnnxRunner:
    """An exported model with its preprocessing and class names, which are in the file."""

    def __init__(self, path: str, providers: Sequence[str] = ("CPUExecutionProvider",)):
        """
        Args:
            providers: onnxruntime's execution providers, as "CUDAExecutionProvider".
        """
        import onnxruntime  # here, so that --help needs no more than OpenCV

        self.session = onnxruntime.InferenceSession(path, providers=list(providers))
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "preprocessing" not in metadata:
            raise ValueError(f"{path}: not a model of tools/export_model.py; how to prepare images is not in it.")
        self.output = metadata["output"]
        self.categories = json.loads(metadata["classes"])
        self.preprocessing = json.loads(metadata["preprocessing"])
        self.score_threshold = float(metadata["score_threshold"])
        self.tracker_options = json.loads(metadata.get("tracker", "{}"))
        self._memory_shape = json.loads(metadata.get("memory", "null"))

    def __call__(self, image: np.ndarray) -> list[Segment]:
        """The segments of an image [H, W, channels] or [H, W] as files have it; colours in BGR order (cv2.imread)."""
        return self.segments(self.outputs(image))

    def outputs(self, image: np.ndarray, memory: "np.ndarray | None" = None) -> "dict[str, np.ndarray]":
        """What the model gives for one image, by the names of its outputs.

        Args:
            memory: the output "kernels" of the previous frame, of a model that has it; None for images.
        """
        padded, size = self.prepare(image)
        inputs = {"image": padded[None], "image_size": np.array(size), "output_size": np.array(image.shape[:2])}
        if self._memory_shape:
            known = np.array([memory is not None])
            memory = np.zeros(self._memory_shape, np.float32) if memory is None else memory
            inputs.update(memory_kernels=memory[None], has_memory=known)
        outputs = dict(zip((x.name for x in self.session.get_outputs()), self.session.run(None, inputs)))
        return {name: value[0] for name, value in outputs.items()}

    def prepare(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """An image as the model wants it, [C, H, W] from 0 to 255, and its height and width in there."""
        options = self.preprocessing
        pixels = self._channels(_scaled(image, options.get("value_range")))
        size = _resized(image.shape[:2], options["min_size"], options["max_size"])
        pixels = resize(pixels, size)
        if options.get("image_type", "uint8") == "uint8" and pixels.dtype != np.uint8:
            pixels = np.rint(pixels).astype(np.uint8)
        step, smallest = options["size_divisibility"], options["smallest_side"]
        padding = [max(-(-length // step) * step, smallest) - length for length in size]
        static_size = options.get("static_size")
        if static_size:
            padding = [most - length for length, most in zip(size, static_size)]
            if min(padding) < 0 or (step == 1 and max(padding)):
                bound = "exactly" if step == 1 else "up to"
                raise ValueError(f"image: resized to {size}, but the model takes {bound} {tuple(static_size)}.")
        pixels = np.pad(pixels, ((0, padding[0]), (0, padding[1]), (0, 0)))
        pixels = pixels.astype(options.get("image_type", "uint8"))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), size

    def _channels(self, pixels: np.ndarray) -> np.ndarray:
        """[H, W, channels] -> [H, W, C] in the model's order."""
        name, count = self.preprocessing["format"], pixels.shape[2]
        wanted = 1 if name == "L" else 3 if name in ("RGB", "BGR") else int(name.partition("-")[0])
        if name == "L" and count == 3:
            grey = sum(pixels[:, :, i].astype(np.float64) * weight for i, weight in enumerate(_LUMINANCE)) / 65536
            return (np.floor(grey + 0.5) if pixels.dtype == np.uint8 else grey).astype(pixels.dtype)[:, :, None]
        if name in ("RGB", "BGR") and count == 1:
            return np.repeat(pixels, 3, axis=2)
        if count != wanted:
            raise ValueError(f"image: {count} channels, but the model takes {wanted} ({name}).")
        return pixels[:, :, ::-1] if name == "RGB" else pixels

    def picture(self, image: np.ndarray) -> np.ndarray:
        """An image to draw on, uint8 [H, W, 3] in BGR order: its first three channels, or the first one thrice."""
        pixels = np.rint(_scaled(image, self.preprocessing.get("value_range"))).astype(np.uint8)
        pixels = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, :1].repeat(3, axis=2)
        return np.ascontiguousarray(pixels[:, :, ::-1] if "channel" in self.preprocessing["format"] else pixels)

    def segments(self, outputs: "dict[str, np.ndarray]") -> list[Segment]:
        """What the model's outputs for one image say."""
        if self.output == "sem_seg":
            label_map = outputs["label_map"]
            return [self._segment(label, None, label_map == label) for label in np.unique(label_map)]
        if self.output == "panoptic_seg":
            count = int((outputs["areas"] > 0).sum())
            masks = (outputs["segment_map"] == row for row in range(1, count + 1))
        else:
            count = int((outputs["scores"] >= self.score_threshold).sum())
            masks = iter(outputs["masks"])
        columns = zip(outputs["labels"][:count], outputs["scores"], masks)
        return [self._segment(*column) for column in columns]

    def _segment(self, label: int, score: float | None, mask: np.ndarray) -> Segment:
        category = self.categories[label]
        return Segment(category["id"], category["name"], None if score is None else float(score), mask)


class OnnxTracker:
    """An exported instance or panoptic model with a memory; call it with the frames of a video in their order."""

    def __init__(self, runner: OnnxRunner):
        if runner.output == "sem_seg" or not runner.tracker_options:
            raise ValueError("A semantic model, or an older file: export an instance or panoptic model to track with.")
        self._tracker = _load_tracker()
        self._runner, self._options = runner, self._tracker.TrackerOptions(**runner.tracker_options)
        self._stuff_ids = {x["id"]: i for i, x in enumerate((x for x in runner.categories if not x["isthing"]), 1)}
        self._state, self._kernels = self._tracker.new_state(1 + len(self._stuff_ids)), None

    def __call__(self, image: np.ndarray) -> list[Segment]:
        """The segments of the next frame, see :meth:`OnnxRunner.__call__`; things without a track are left out."""
        outputs = self._runner.outputs(image, self._kernels)
        self._kernels = outputs.get("kernels")
        segments = self._runner.segments(outputs)
        labels, embeddings = outputs["labels"], outputs["embeddings"]
        things = [i for i in range(len(segments)) if self._runner.categories[labels[i]]["isthing"]]
        if self._runner.output == "instances":
            likely = [i for i in things if segments[i].score > self._options.min_score]
            masks = np.array([segments[i].mask for i in likely]).reshape(-1, *image.shape[:2])
            scores = np.array([segments[i].score for i in likely])
            kept, masks = self._tracker.one_owner(masks, scores, self._options.overlap_threshold)
            things = [likely[i] for i in kept]
            for i, mask in zip(things, masks):
                segments[i] = segments[i]._replace(mask=mask)
        scores = np.array([segments[i].score for i in things])
        found = self._tracker.Detections(labels[things], scores, embeddings[things])
        self._state, ids = self._tracker.step(self._state, found, self._options)
        of_thing = dict(zip(things, ids.tolist()))
        columns = ((x, of_thing.get(i) or self._stuff_ids.get(x.category_id)) for i, x in enumerate(segments))
        return [x._replace(track_id=track_id) for x, track_id in columns if track_id]


def _load_tracker():
    """The module knet_d2/video/tracker.py, without the rest of its package."""
    here = os.path.dirname(os.path.abspath(__file__))
    paths = [os.path.join(here, "tracker.py"), os.path.join(here, "..", "knet_d2", "video", "tracker.py")]
    path = next((x for x in paths if os.path.isfile(x)), None)
    if path is None:
        raise ValueError(f"{paths[0]} does not exist: copy knet_d2/video/tracker.py there.")
    spec = importlib.util.spec_from_file_location("knet_d2_tracker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _resized(size: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """The size with the shorter side made ``shortest`` (0: as it is) and the longer one at most ``longest``."""
    if shortest == 0:
        return size
    scale = shortest / min(size)
    height, width = (length * scale if length != min(size) else shortest for length in size)
    if max(height, width) > longest:
        scale = longest / max(height, width)
        height, width = height * scale, width * scale
    return int(height + 0.5), int(width + 0.5)


def _scaled(image: np.ndarray, value_range: "Sequence[float] | None") -> np.ndarray:
    """[H, W, channels] of uint8 or float32 from 0 to 255; whole numbers become uint8."""
    low, high = value_range or _TYPE_RANGES.get(image.dtype.name, (0, -1))
    if image.ndim not in (2, 3) or not image.size or not np.isfinite(image).all() or high < low:
        found = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"image: {found}, expected uint8, uint16 or finite floats [height, width, channels].")
    if not value_range and (image.min() < low or image.max() > high):
        raise ValueError(f"image: {image.dtype} with values from {image.min()} to {image.max()}, expected 0 to 1.")
    image = image[:, :, None] if image.ndim == 2 else image
    if image.dtype == np.uint8 and not value_range:
        return image
    values = (image.clip(low, high).astype(np.float64) - low) * 255 / (high - low)
    rounded = np.rint(values)
    return rounded.astype(np.uint8) if np.abs(values - rounded).max() < 1e-3 else values.astype(np.float32)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 or float32 [H, W, C] to (height, width) with Pillow's bilinear filter, as in training.

    OpenCV's does not average over the source's pixels when it makes an image smaller.
    """
    height, width = size
    if image.shape[1] != width:
        # Whole rows are added up faster than single pixels
        image = _resize_rows(np.ascontiguousarray(image.swapaxes(0, 1)), width).swapaxes(0, 1)
    return _resize_rows(np.ascontiguousarray(image), height) if image.shape[0] != height else image


def _resize_rows(image: np.ndarray, length: int) -> np.ndarray:
    """[H, W, C] -> [length, W, C], in Pillow's fixed-point numbers if it is uint8."""
    old_length = image.shape[0]
    scale = old_length / length
    reach = max(scale, 1.0)
    centers = (np.arange(length) + 0.5) * scale
    first = np.maximum((centers - reach + 0.5).astype(int), 0)
    last = np.minimum((centers + reach + 0.5).astype(int), old_length)
    taps = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(1 - np.abs((taps + 0.5 - centers[:, None]) / reach), 0) * (taps < last[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    if image.dtype != np.uint8:
        parts = zip(np.minimum(taps, old_length - 1).T, weights.T)
        return sum(image[tap] * weight[:, None, None] for tap, weight in parts).astype(np.float32)
    fixed_point = np.floor(weights * (1 << _PRECISION) + 0.5).astype(np.int32)
    total = np.full((length, *image.shape[1:]), 1 << (_PRECISION - 1), np.int32)
    for tap, weight in zip(np.minimum(taps, old_length - 1).T, fixed_point.T):
        total += image[tap] * weight[:, None, None]
    return (total >> _PRECISION).clip(0, 255).astype(np.uint8)


def draw(image: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """The image with coloured masks, outlines and names."""
    drawn = image.copy()
    for number, segment in enumerate(segments):
        number = number if segment.track_id is None else segment.track_id
        hue = np.uint8([[[(number * 47) % 180, 200, 230]]])
        color = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0]
        drawn[segment.mask] = drawn[segment.mask] // 2 + color // 2
    for segment in segments:
        contours, _ = cv2.findContours(segment.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(drawn, contours, -1, (255, 255, 255), 1)
        if segment.mask.any():
            y, x = (int(p.mean()) for p in segment.mask.nonzero())
            name = segment.name if segment.track_id is None else f"{segment.name} {segment.track_id}"
            cv2.putText(drawn, name, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255))
    return drawn


def read(path: str, image_format: str) -> np.ndarray:
    """An image file as OnnxRunner takes it."""
    if path.lower().endswith(".npy"):
        image = np.load(path, allow_pickle=False)
        return image[:, :, ::-1] if image_format in ("RGB", "BGR", "L") and image.shape[2:] == (3,) else image
    if image_format in ("RGB", "BGR", "L"):
        image = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    else:
        pages = cv2.imreadmulti(path, flags=cv2.IMREAD_UNCHANGED)[1]
        image = np.dstack(pages) if pages else None
        if len(pages) == 1 and pages[0].shape[2:] in ((3,), (4,)):
            image = image[:, :, [2, 1, 0, 3][: image.shape[2]]]  # from OpenCV's BGR, as in training
    if image is None:
        raise SystemExit(f"Error: {path} can't be read as an image.")
    return image


def run_video(runner: OnnxRunner, path: str, output: "str | None") -> None:
    """Follow the objects of a video: print the ids of each frame, and draw them into a video."""
    tracker, video, writer, number = OnnxTracker(runner), cv2.VideoCapture(path), None, 0
    while True:
        success, frame = video.read()
        if not success:
            break
        segments = tracker(frame)
        print(f"frame {number}: " + ", ".join(f"{x.name} {x.track_id}" for x in segments))
        if output:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            writer = writer or cv2.VideoWriter(output, code, video.get(cv2.CAP_PROP_FPS) or 25, frame.shape[1::-1])
            writer.write(draw(runner.picture(frame), segments))
        number += 1
    if writer is not None:
        writer.release()
    if not number:
        raise SystemExit(f"Error: {path} can't be read as a video.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("image")
    parser.add_argument("--output", help="picture, or video, to write")
    parser.add_argument("--video", action="store_true", help="the input is a video, whose objects are followed")
    args = parser.parse_args()
    runner = OnnxRunner(args.model)
    if args.video:
        return run_video(runner, args.image, args.output)
    image = read(args.image, runner.preprocessing["format"])
    segments = runner(image)
    for segment in segments:
        score = "" if segment.score is None else f"  {segment.score:.3f}"
        print(f"{segment.name}{score}  {int(segment.mask.sum())} pixels")
    if args.output:
        picture = runner.picture(image)
        cv2.imwrite(args.output, draw(picture, segments))


if __name__ == "__main__":
    main()
