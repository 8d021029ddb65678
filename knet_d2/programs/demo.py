"""Run K-Net on images, a video or a webcam; the command line is that of Detectron2's demo. See demo/README.md."""

import argparse
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import tqdm
from detectron2.config import CfgNode
from detectron2.utils.video_visualizer import VideoVisualizer
from PIL import Image

from ..data.classes import ClassTable, categories
from ..data.files import IMAGE_TYPES, find_images, read_image
from ..engine import Predictor
from ..errors import ConfigError, DataError
from ..inference.loading import resolve_model
from ..results.coco import instance_results, panoptic_png, semantic_results
from ..results.drawing import draw_prediction, main_output, output_metadata, to_cpu

ESCAPE = 27

logger = logging.getLogger("knet_d2.demo")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Segment images or videos with K-Net.")
    parser.add_argument("--config-file", metavar="FILE", help="path to config file; default: the one in the weights")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="image files, folders of images, or quoted patterns as 'a/*.jpg'")
    source.add_argument("--video-input", metavar="FILE", help="video file")
    source.add_argument("--webcam", action="store_true", help="take pictures from the webcam")
    parser.add_argument("--output", help="folder or file for the pictures; without it a window shows them")
    parser.add_argument("--json", metavar="FILE", help="write the results (images only)")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.3, help="lowest score of an instance or thing segment"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")
    return parser


def demo_model(args: argparse.Namespace) -> tuple[CfgNode, ClassTable]:
    """The config, with the confidence threshold where post-processing reads it, and the classes."""
    cfg, classes = resolve_model(args.config_file, args.opts)
    cfg.MODEL.KNET.TEST.SCORE_THRESHOLD = args.confidence_threshold
    cfg.MODEL.KNET.TEST.THING_SCORE_THRESHOLD = args.confidence_threshold
    cfg.freeze()
    return cfg, classes


class Demo:
    """Predicts and draws."""

    def __init__(self, cfg: CfgNode, classes: ClassTable):
        self.predictor = Predictor(cfg)
        self.classes = classes
        self._video_visualizer: VideoVisualizer | None = None

    def predict(self, image: np.ndarray) -> dict[str, Any]:
        """The model's outputs for an RGB image."""
        return to_cpu(self.predictor(image[:, :, ::-1]))

    def draw(self, image: np.ndarray, outputs: dict[str, Any]) -> np.ndarray:
        return draw_prediction(image, outputs, self.classes)

    def draw_frame(self, frame: np.ndarray, outputs: dict[str, Any]) -> np.ndarray:
        """As :meth:`draw`, but an object keeps its colour from frame to frame."""
        kind = main_output(outputs)
        if self._video_visualizer is None:
            self._video_visualizer = VideoVisualizer(output_metadata(self.classes, kind))
        if kind == "panoptic_seg":
            drawn = self._video_visualizer.draw_panoptic_seg_predictions(frame, *outputs[kind])
        elif kind == "instances":
            drawn = self._video_visualizer.draw_instance_predictions(frame, outputs[kind])
        else:
            drawn = self._video_visualizer.draw_sem_seg(frame, outputs[kind].argmax(dim=0))
        return drawn.get_image()


class ResultWriter:
    """Collects the results of images and writes them as JSON, with panoptic PNGs in a folder beside it."""

    def __init__(self, path: str, cfg: CfgNode, demo: Demo):
        self._path = path
        self._png_folder = os.path.splitext(path)[0] + "_panoptic"
        self._category_ids = demo.classes.category_ids
        self._content: dict[str, Any] = {
            "info": {"task": cfg.MODEL.KNET.TASK, "weights": cfg.MODEL.WEIGHTS},
            "categories": categories(demo.classes),
            "images": [],
        }

    def add(self, file_name: str, outputs: dict[str, Any], size: tuple[int, int]) -> None:
        record: dict[str, Any] = {"file_name": file_name, "height": size[0], "width": size[1]}
        if "instances" in outputs:
            record["instances"] = instance_results(outputs["instances"], self._category_ids)
        if "panoptic_seg" in outputs:
            segment_ids, segments_info = outputs["panoptic_seg"]
            record["panoptic"] = {
                "file_name": self._save_png(panoptic_png(segment_ids)),
                "segments_info": segments_info,
            }
        if "sem_seg" in outputs:
            record["semantic"] = semantic_results(outputs["sem_seg"], self._category_ids)
        self._content["images"].append(record)

    def _save_png(self, picture: np.ndarray) -> str:
        os.makedirs(self._png_folder, exist_ok=True)
        name = f"{len(self._content['images']):06d}.png"
        Image.fromarray(picture).save(os.path.join(self._png_folder, name))
        return name

    def save(self) -> None:
        with open(self._path, "w") as f:
            json.dump(self._content, f)


def output_path(args: argparse.Namespace, path: str, taken: list[str]) -> str:
    """Where the picture of ``path`` goes: --output itself when that names an image file, else a new file in it."""
    if len(args.input) == 1 and os.path.isfile(args.input[0]) and args.output.lower().endswith(IMAGE_TYPES):
        return args.output
    os.makedirs(args.output, exist_ok=True)
    stem, ending = os.path.splitext(os.path.basename(path))
    ending = ending if ending.lower() in (".jpg", ".jpeg", ".png") else ".png"
    result = os.path.join(args.output, stem + ending)
    number = 1
    while result in taken:  # images of one name from several folders
        result = os.path.join(args.output, f"{stem}_{number}{ending}")
        number += 1
    return result


def show(title: str, picture: np.ndarray, milliseconds: int) -> bool:
    """Show an RGB picture in a window; False when the user pressed escape."""
    try:
        cv2.imshow(title, picture[:, :, ::-1])
        return cv2.waitKey(milliseconds) != ESCAPE
    except cv2.error as e:
        raise ConfigError("No window can be opened (no display, or OpenCV's headless build): use --output.") from e


def run_on_images(args: argparse.Namespace, cfg: CfgNode, classes: ClassTable) -> int:
    """Returns the number of images that could not be read."""
    files = find_images(args.input)
    demo = Demo(cfg, classes)
    results = ResultWriter(args.json, cfg, demo) if args.json else None
    written: list[str] = []
    failed = 0
    for path in tqdm.tqdm(files, unit="image", disable=len(files) == 1):
        try:
            image = read_image(path, "RGB")
        except DataError as error:
            failed += 1
            logger.error(f"Skipped: {error}")
            continue
        outputs = demo.predict(image)
        if results is not None:
            results.add(path, outputs, image.shape[:2])
        if args.output:
            written.append(output_path(args, path, written))
            Image.fromarray(demo.draw(image, outputs)).save(written[-1])
        elif results is None and not show("K-Net", demo.draw(image, outputs), 0):
            break
    if results is not None:
        results.save()
    return failed


def frames_of(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        success, frame = video.read()
        if not success:
            return
        yield np.ascontiguousarray(frame[:, :, ::-1])


def run_on_video(args: argparse.Namespace, cfg: CfgNode, classes: ClassTable) -> None:
    """Draw into every frame of a video file or of the webcam."""
    if args.video_input and not os.path.isfile(args.video_input):
        raise DataError(f"--video-input {args.video_input}: there is no such file.")
    video = cv2.VideoCapture(0 if args.webcam else args.video_input)
    if not video.isOpened():
        raise DataError(f"{'The webcam' if args.webcam else args.video_input} can't be read as a video.")
    demo = Demo(cfg, classes)
    count = None if args.webcam else int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    writer = None
    try:
        for frame in tqdm.tqdm(frames_of(video), total=count, unit="frame"):
            drawn = demo.draw_frame(frame, demo.predict(frame))
            if args.output:
                writer = writer or open_video(args, video, drawn.shape[:2])
                writer.write(drawn[:, :, ::-1])
            elif not show("K-Net", drawn, 1):
                break
    finally:
        video.release()
        if writer is not None:
            writer.release()


def open_video(args: argparse.Namespace, video: cv2.VideoCapture, size: tuple[int, int]) -> cv2.VideoWriter:
    """A writer of MP4 files for frames of ``size`` (height, width)."""
    path = args.output
    if os.path.isdir(path):
        name = os.path.basename(args.video_input) if args.video_input else "webcam"
        path = os.path.join(path, os.path.splitext(name)[0] + "_knet.mp4")
    rate = video.get(cv2.CAP_PROP_FPS) or 25.0
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), rate, (size[1], size[0]))
    if not writer.isOpened():
        raise ConfigError(f"--output {path}: OpenCV can't write a video there; give a folder or a file ending in .mp4.")
    return writer


def main(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    cfg, classes = demo_model(args)
    if args.input:
        return 1 if run_on_images(args, cfg, classes) else 0
    run_on_video(args, cfg, classes)
    return 0
