"""Tracing of a model, and files with all that a runner has to know."""

import io
import json

import torch
from detectron2.config import CfgNode
from torch.export import Dim, ExportedProgram

from ..checkpoint import describe_model, write_atomically
from ..data.classes import ClassTable
from ..errors import ConfigError
from ..modeling.meta_arch import KNet
from ..video.model import tracker_options
from .graph import INPUT_NAMES, OUTPUT_NAMES, ExportableKNet, example_inputs

ONNX_COMMAND = "install what it needs with: python -m pip install onnx onnxscript onnxruntime"
METADATA_FILE = "knet_d2.json"


def halve(model: KNet) -> KNet:
    """Make the backbone and the static kernels' producer compute in float16 (in place); the cascade stays float32."""
    model.backbone.half()
    model.sem_seg_head.half()
    return model


def default_image_type(cfg: CfgNode) -> str:
    """ "uint8" for colours of 8 bits; else "float32", which also keeps what files of more bits hold."""
    return "uint8" if cfg.INPUT.FORMAT in ("RGB", "BGR") and not cfg.INPUT.VALUE_RANGE else "float32"


def trace(model: KNet, image_type: str = "uint8") -> ExportedProgram:
    """The graph of a model in evaluation mode: see :class:`ExportableKNet` for its inputs and outputs.

    Batch, height, width and the sizes in the inputs are dynamic; sides are multiples of ``model.size_divisibility``,
    at least two of them.

    Args:
        image_type: of the input "image", "uint8" or "float32".

    Raises:
        ConfigError: the model can't be exported.
    """
    step = max(model.size_divisibility, 1)
    sides = {2: step * Dim("rows", min=2), 3: step * Dim("columns", min=2)}
    if step == 1:
        sides = {2: Dim("height", min=64), 3: Dim("width", min=64)}
    shapes = {"image": {0: Dim("batch", min=1), **sides}, "image_size": None, "output_size": None}
    inputs = example_inputs(model, getattr(torch, image_type))
    with torch.no_grad():
        return torch.export.export(ExportableKNet(model).eval(), (), inputs, dynamic_shapes=shapes, strict=False)


def export_metadata(cfg: CfgNode, classes: ClassTable, model: KNet, image_type: str = "uint8") -> dict[str, str]:
    """What travels in an exported file: the model's description, its task and output, and how to prepare an image.

    Args:
        image_type: see :func:`trace`.
    """
    step = max(model.size_divisibility, 1)
    preprocessing = {
        "format": cfg.INPUT.FORMAT,
        # In files; [] is that of their type, as of knet_d2.data.pixels
        "value_range": list(cfg.INPUT.VALUE_RANGE),
        "image_type": image_type,
        # As Detectron2's ResizeShortestEdge, with Pillow's bilinear filter; 0: not resized
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "size_divisibility": step,
        "smallest_side": 2 * step if step > 1 else 64,
    }
    return {
        **describe_model(cfg, classes),
        "task": cfg.MODEL.KNET.TASK,
        "output": model.postprocessor.options.outputs[0],
        "preprocessing": json.dumps(preprocessing),
        "score_threshold": str(cfg.MODEL.KNET.TEST.SCORE_THRESHOLD),
        "tracker": json.dumps(tracker_options(cfg)._asdict()),
    }


def save_onnx(program: ExportedProgram, path: str, metadata: dict[str, str]) -> None:
    """Write a traced model as one ONNX file, with the metadata among its properties."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError(f"{path}: ONNX needs packages; {ONNX_COMMAND}.") from None
    names = OUTPUT_NAMES[metadata["output"]]
    converted = torch.onnx.export(program, input_names=INPUT_NAMES, output_names=names, dynamo=True, verbose=False)
    converted.model.metadata_props.update(metadata)
    content = converted.model_proto.SerializeToString()
    write_atomically(path, lambda f: f.write(content))


def save_pt2(program: ExportedProgram, path: str, metadata: dict[str, str]) -> None:
    """Write a traced model for torch.export.load, with the metadata as the extra file METADATA_FILE."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    write_atomically(path, lambda f: f.write(buffer.getvalue()))
