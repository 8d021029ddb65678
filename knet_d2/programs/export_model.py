"""Export a trained K-Net as one graph from the image to the final result: as ONNX (.onnx) or torch.export (.pt2).

    %(prog)s output/my_photos model.onnx

knet_d2.load("model.onnx") predicts with the file; see knet docs DEPLOYMENT.
"""

import argparse
import itertools
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from ..errors import ConfigError
from ..export import default_image_type, export_metadata, halve, save_onnx, save_pt2, trace
from ..export.quantization import quantize, share_of_operations
from ..inference import ImagePredictor
from ..inference.from_file import THRESHOLD_HELP
from ..inference.onnx_engine import OnnxPredictor
from ..inference.sources import ImageFiles
from ..modeling.meta_arch import KNet
from .arguments import MODEL_HELP, add_config_arguments, load_predictor, size

logger = logging.getLogger("knet_d2")

WRITERS = {".onnx": save_onnx, ".pt2": save_pt2}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help=MODEL_HELP)
    parser.add_argument("outputs", nargs="+", metavar="output", help="files to write, ending in .onnx or .pt2")
    parser.add_argument("--confidence-threshold", type=float, help=THRESHOLD_HELP)
    parser.add_argument("--fp16", action="store_true", help="compute backbone and static kernels in float16")
    parser.add_argument(
        "--image-type",
        choices=("uint8", "float32"),
        help="of the graph's input; float32 keeps what images of more than 8 bits hold, and is the default where "
        "INPUT.FORMAT is not RGB or BGR or INPUT.VALUE_RANGE is set",
    )
    parser.add_argument(
        "--int8",
        nargs="+",
        metavar="IMAGES",
        help="ONNX: convolutions in 8-bit integers, calibrated on these images (files, folders, patterns) of training",
    )
    parser.add_argument("--int8-images", type=int, default=100, metavar="N", help="most images of the calibration")
    parser.add_argument(
        "--int8-float",
        nargs="+",
        default=[],
        metavar="NAME",
        help="modules that stay in float32, such as backbone.bottom_up.stem: beginnings of the names in the file's "
        "property quantization",
    )
    parser.add_argument(
        "--int8-full-range",
        action="store_true",
        help="weights of 8 bits instead of 7, only for processors with VNNI; on others, sums saturate",
    )
    parser.add_argument(
        "--size",
        metavar="HxW",
        type=size,
        help="fixed height and width of the padded images, in multiples of 32; needed by attention in windows (Swin)",
    )
    parser.add_argument("--device", default="cpu", help="device on which the .pt2 file will run: cpu, cuda, ...")
    add_config_arguments(parser)
    return parser


def save_int8(
    program: ExportedProgram, path: str, metadata: dict[str, str], predictor: ImagePredictor, args: argparse.Namespace
) -> None:
    """Write a traced model as an ONNX file in 8-bit integers, and print what is in integers."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "float.onnx")
        save_onnx(program, source, metadata)
        inputs = calibration_inputs(OnnxPredictor(source), args.int8, args.int8_images)
        found = quantize(source, path, inputs, not args.int8_full_range, args.int8_float)
    share = share_of_operations(predictor.model, example_sample(predictor.model), found.layers)
    bits = 7 if found.reduce_range else 8
    numbers = f"{bits} bits, {found.num_images} images, {share:.0%} of the operations"
    print(f"{len(found.layers)} convolutions are computed in integers ({numbers})")
    print(f"In float32: {', '.join(found.float_layers) or 'no other convolution'}, and the update stages")


def calibration_inputs(exported: OnnxPredictor, images: Sequence[str], most: int) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of an exported file for images, of which the ranges of its activations are taken.

    Args:
        images: files, folders, patterns.
        most: number of images at most.
    """
    frames = ImageFiles(images, exported.pixel_format)
    for image in itertools.islice((x.image for x in frames if x.image is not None), most):
        yield exported.inputs([exported.sample(exported.pixel_format.arrange(image, "The image"))])


def example_sample(model: KNet) -> dict[str, Any]:
    """An input of a model, of 512 x 512 pixels."""
    return {"image": torch.zeros(len(model.preprocessor.pixel_mean), 512, 512, dtype=torch.uint8)}


def main(args: argparse.Namespace) -> None:
    logger.setLevel(logging.WARNING)
    for path in args.outputs:
        if os.path.splitext(path)[1] not in WRITERS:
            raise ConfigError(f"{path}: the name of an exported model must end in .onnx or .pt2.")
        if args.int8 and (args.fp16 or not path.endswith(".onnx")):
            raise ConfigError(f"--int8: {path}: use it for .onnx files and without --fp16.")
    predictor = load_predictor(args.weights, args)
    model = halve(predictor.model) if args.fp16 else predictor.model
    image_type = args.image_type or default_image_type(predictor.cfg)
    metadata = export_metadata(predictor.cfg, predictor.classes, model, image_type, args.size)
    print("Following the model's operations: this takes a minute or more.", flush=True)
    program = trace(model, image_type, args.size)
    for path in args.outputs:
        if args.int8:
            save_int8(program, path, metadata, predictor, args)
        else:
            WRITERS[os.path.splitext(path)[1]](program, path, metadata)
        megabytes = os.path.getsize(path) / 2**20
        print(f"Wrote {path}: {metadata['task']} model, output {metadata['output']}, {megabytes:.1f} MB")
