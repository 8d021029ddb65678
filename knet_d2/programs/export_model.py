"""Export a trained K-Net as one graph from the image to the final result: as ONNX (.onnx) or torch.export (.pt2).

See docs/DEPLOYMENT.md. tools/onnx_runner.py runs the ONNX file, and checks/exports.py compares it with the model.
"""

import argparse
import logging
import os

from ..errors import ConfigError
from ..export import default_image_type, export_metadata, halve, save_onnx, save_pt2, trace
from ..inference.from_file import load

logger = logging.getLogger("knet_d2")

WRITERS = {".onnx": save_onnx, ".pt2": save_pt2}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="the trained model, a .pth or .safetensors file")
    parser.add_argument("outputs", nargs="+", metavar="output", help="files to write, ending in .onnx or .pt2")
    parser.add_argument("--config-file", metavar="FILE", help="config for weights that contain none")
    parser.add_argument("--confidence-threshold", type=float, default=0.3, help="lowest score; fixed in the file")
    parser.add_argument("--fp16", action="store_true", help="compute backbone and static kernels in float16")
    parser.add_argument(
        "--image-type",
        choices=("uint8", "float32"),
        help="of the graph's input; float32 keeps what images of more than 8 bits hold, and is the default where "
        "INPUT.FORMAT is not RGB or BGR or INPUT.VALUE_RANGE is set",
    )
    parser.add_argument("--device", default="cpu", help="device on which the .pt2 file will run: cpu, cuda, ...")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, last on the line")
    return parser


def main(args: argparse.Namespace) -> None:
    logger.setLevel(logging.WARNING)
    for path in args.outputs:
        if os.path.splitext(path)[1] not in WRITERS:
            raise ConfigError(f"{path}: the name of an exported model must end in .onnx or .pt2.")
    predictor = load(
        args.weights,
        confidence_threshold=args.confidence_threshold,
        device=args.device,
        config_file=args.config_file,
        opts=args.opts,
    )
    model = halve(predictor.model) if args.fp16 else predictor.model
    image_type = args.image_type or default_image_type(predictor.cfg)
    metadata = export_metadata(predictor.cfg, predictor.classes, model, image_type)
    program = trace(model, image_type)
    for path in args.outputs:
        WRITERS[os.path.splitext(path)[1]](program, path, metadata)
        megabytes = os.path.getsize(path) / 2**20
        print(f"Wrote {path}: {metadata['task']} model, output {metadata['output']}, {megabytes:.1f} MB")
