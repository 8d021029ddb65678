"""Run K-Net on images, a video or a webcam, with the command line of Detectron2's demo."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

import tqdm

from ..data.files import refuse_to_replace
from ..errors import ConfigError
from ..evaluation.report import recommended_threshold
from ..inference.batches import read_ahead
from ..inference.detectron2_predictor import Predictor
from ..inference.from_file import THRESHOLD_HELP, resolve_model, threshold_options
from ..inference.image_predictor import ImagePredictor
from ..inference.sinks import (
    CsvFile,
    JsonFile,
    JsonLines,
    MaskFiles,
    PictureFiles,
    Sink,
    Stop,
    TrackFile,
    VideoFile,
    VideoWindow,
    Window,
)
from ..inference.sources import Frame, ImageFiles, Video
from ..results.prediction import Prediction
from .arguments import add_config_arguments

logger = logging.getLogger(__name__)

_REPORT = "the training run's report"
IMAGES_HELP = "image files, folders, or quoted patterns such as 'a/*.jpg'"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Segment images or videos with K-Net.")
    parser.add_argument("--input", nargs="+", default=[], help=IMAGES_HELP)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments but that of the images."""
    parser.add_argument("--video-input", metavar="FILE", help="video file or stream (rtsp://...) instead of images")
    parser.add_argument("--webcam", action="store_true", help="the webcam instead of images")
    parser.add_argument("--output", help="folder or file for the pictures; default: show them in a window")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the results of all images or frames to this file; -: to the standard output, a line for each",
    )
    parser.add_argument(
        "--csv", metavar="FILE", help=f"write a row for each segment to this file: {', '.join(CsvFile.COLUMNS)}"
    )
    parser.add_argument(
        "--masks",
        metavar="FOLDER",
        help="write a PNG for each image: the number of the class at each pixel, and the ignore value (255) where "
        "there is none; of an instance model the number of the instance in 16 bits, and 0",
    )
    parser.add_argument(
        "--trail", type=int, default=0, metavar="FRAMES", help="video: draw the path of objects in the last frames"
    )
    parser.add_argument("--confidence-threshold", type=float, help=THRESHOLD_HELP)
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images predicted at once")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="threads that read and resize images")
    add_config_arguments(parser)


def build_predictor(args: argparse.Namespace) -> ImagePredictor:
    """Build the predictor, with --confidence-threshold as its score threshold; --opts can overwrite it."""
    options = [*threshold_options(args.confidence_threshold, args.opts), *args.opts]
    cfg, classes, content = resolve_model(args.config_file, options)
    return ImagePredictor(cfg, classes, Predictor(cfg, content))


def build_sinks(
    args: argparse.Namespace, source: ImageFiles | Video, predictor: ImagePredictor, lines: TextIO | None = None
) -> list[Sink]:
    """Build the sinks for the results: files, or a window if the command line names no file.

    The files are opened at once, so that a wrong path is an error before the first image is read.

    Args:
        lines: where the results of --json - are written.
    """
    sinks: list[Sink] = []
    info = {"task": predictor.cfg.MODEL.KNET.TASK, "weights": predictor.cfg.MODEL.WEIGHTS}
    inputs = [*([source.name] if isinstance(source, Video) else source.paths), predictor.cfg.MODEL.WEIGHTS]
    if lines is not None:
        sinks.append(JsonLines(lines, info, predictor.classes))
    elif args.json:
        refuse_to_replace(inputs, [args.json], f"--json {args.json}")
        sinks.append(JsonFile(args.json, info, predictor.classes))
    if args.csv:
        refuse_to_replace(inputs, [args.csv], f"--csv {args.csv}")
        sinks.append(CsvFile(args.csv, predictor.classes))
    if isinstance(source, Video):
        if args.masks:
            raise ConfigError(f"--masks {args.masks}: is for images. The masks of a video's objects are in --json.")
        if args.json and lines is None:
            sinks.append(TrackFile(os.path.splitext(args.json)[0] + "_tracks.json"))
        if args.output:
            sinks.append(VideoFile(video_path(args.output, source.name), source, predictor.classes, args.trail))
        else:
            sinks.append(VideoWindow(predictor.classes, args.trail))
        return sinks
    pictures = PictureFiles(args.output, source.paths) if args.output else None
    if pictures is not None:
        sinks.append(pictures)
    if args.masks:
        classes, ignore = predictor.classes, predictor.cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        others = () if pictures is None else pictures.paths
        masks = MaskFiles(args.masks, source.paths, len(classes.names), ignore, others)
        sinks.append(masks)
        if predictor.outputs[0] != "instances":
            values = [*map("{0[0]} {0[1]}".format, enumerate(classes.names)), f"{masks.void} none"]
            logger.info(
                f"Values of the masks in {args.masks}: {', '.join(values)}. Such small numbers look black. "
                "knet annotate --format png writes the values of your own masks instead."
            )
    return sinks or [Window(milliseconds=0)]


def video_path(output: str, name: str) -> str:
    """Return the path of the video: --output, or a file in it if it is a folder."""
    if not os.path.isdir(output):
        return output
    return os.path.join(output, os.path.splitext(os.path.basename(name))[0] + "_knet.mp4")


@contextlib.contextmanager
def reserved_output() -> Iterator[TextIO]:
    """The standard output of the process, for results alone; what else is written to it goes to standard error."""
    sys.stdout.flush()
    stream = open(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        yield stream
    finally:
        sys.stdout.flush()
        os.dup2(stream.fileno(), 1)
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def main(args: argparse.Namespace) -> int:
    """Run the demo; returns exit code 1 if an image or a part of the video can't be read, else 0."""
    if bool(args.input) + bool(args.video_input) + args.webcam != 1:
        raise ConfigError("Name what to segment: either images, or --video-input FILE, or --webcam.")
    with reserved_output() if args.json == "-" else contextlib.nullcontext() as lines:
        return predict(args, lines)


def predict(args: argparse.Namespace, lines: TextIO | None = None) -> int:
    """Predict on the source, and write the results; lines: see :func:`build_sinks`."""
    predictor = build_predictor(args)
    if args.input:
        source: ImageFiles | Video = ImageFiles(args.input, predictor.pixel_format, args.workers)
    else:
        source = Video(args.video_input)
    found: Iterator[tuple[Frame, dict[str, Prediction]]]
    counts: list[int] = []
    with contextlib.suppress(Stop), contextlib.ExitStack() as stack:
        sinks = build_sinks(args, source, predictor, lines)
        for sink in sinks:
            stack.callback(sink.close)
        frames = tqdm.tqdm(source, total=source.count, unit=source.unit, disable=True if source.count == 1 else None)
        if isinstance(source, Video):
            follow = predictor.follower()
            found = ((frame, follow(frame.image)) for frame in read_ahead(frames))
        else:
            found = predictor.predict_frames(frames, args.batch_size, args.workers)
        for frame, predictions in found:
            for sink in sinks:
                sink.write(frame, predictions)
            main = predictions[predictor.outputs[0]]
            counts.append(sum(segment.label < main.classes.num_things for segment in main.segments))
    number = len(counts)
    written = [path for path in (args.output, args.masks, args.json, args.csv) if path not in (None, "-")]
    if written:
        print(f"Wrote the results of {number} {source.unit}{'s' * (number != 1)} to {', '.join(written)}.")
    if predictor.outputs[0] != "sem_seg":
        print(what_was_found(counts, source.unit, predictor))
    return 1 if source.failed else 0


def what_was_found(counts: Sequence[int], unit: str, predictor: ImagePredictor) -> str:
    """A sentence on the numbers of objects, and with which threshold they were found.

    Args:
        counts: number of objects in each image or frame.
        unit: "image" or "frame".
        predictor: if its weights are in a training run's folder, the threshold of the report there is named.
    """
    test = predictor.cfg.MODEL.KNET.TEST
    used = test.SCORE_THRESHOLD if predictor.outputs[0] == "instances" else test.THING_SCORE_THRESHOLD
    best = recommended_threshold(os.path.dirname(predictor.cfg.MODEL.WEIGHTS))
    recommended = f", as {_REPORT} recommends" if best == used else f"; {_REPORT} recommends {best}"
    other = "" if best is None else recommended
    nothing = f", none in {counts.count(0)} of them" if 0 in counts else ""
    return (
        f"Found {sum(counts)} object{'s' * (sum(counts) != 1)} in {len(counts)} {unit}{'s' * (len(counts) != 1)}"
        f"{nothing} (--confidence-threshold {used:g}{other})."
    )
