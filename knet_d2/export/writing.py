"""Tracing of a model, and files with all that a runner has to know."""

import io
import json

import torch
from detectron2.config import CfgNode
from torch.export import Dim, ExportedProgram

from ..checkpoint import describe_model, write_atomically
from ..data.classes import ClassTable
from ..errors import ConfigError
from ..modeling.backbone import DeformableAttention
from ..modeling.meta_arch import KNet
from ..modeling.static_kernels.image_kernels import ImageKernels
from ..video.model import tracker_options
from .graph import (
    INPUT_NAMES,
    MEMORY_INPUT_NAMES,
    MEMORY_OUTPUT_NAMES,
    OUTPUT_NAMES,
    ExportableKNet,
    example_inputs,
    has_windows,
    memory_shape,
)

ONNX_COMMAND = "install what it needs with: python -m pip install onnx onnxscript onnxruntime"
METADATA_FILE = "knet_d2.json"
# The first one with deformable convolutions
DEFORM_CONV_OPSET = 19


def halve(model: KNet) -> KNet:
    """Make backbone, neck and the static kernels' producer compute in float16 (in place).

    Deformable attention, whose coordinates need it, and the cascade stay float32.
    """
    model.backbone.half()
    model.sem_seg_head.half()
    for module in model.modules():
        if isinstance(module, DeformableAttention):
            module.float()
        elif isinstance(module, ImageKernels):  # it computes these in float32
            networks = (module.local, module.mask_network) if module.mask_network is not None else ()
            for part in (module.center_predictor, module.kernel_branch, module.extent, *networks):
                part.float()
    return model


def default_image_type(cfg: CfgNode) -> str:
    """ "uint8" for colours of 8 bits; else "float32", which also keeps what files of more bits hold."""
    return "uint8" if cfg.INPUT.FORMAT in ("RGB", "BGR") and not cfg.INPUT.VALUE_RANGE else "float32"


def trace(model: KNet, image_type: str = "uint8", size: tuple[int, int] | None = None) -> ExportedProgram:
    """The graph of a model in evaluation mode: see :class:`ExportableKNet` for its inputs and outputs.

    Batch, height, width and the sizes in the inputs are dynamic; sides are multiples of ``model.size_divisibility``,
    at least two of them.

    Args:
        image_type: of the input "image", "uint8" or "float32".
        size: fixed height and width of the input "image", which attention in windows needs; None: dynamic.

    Raises:
        ConfigError: the model can't be exported, or not at this size.
    """
    step = max(model.size_divisibility, 1)
    if size is not None and any(length < 64 or length % step for length in size):
        raise ConfigError(f"--size {size[0]}x{size[1]}: use multiples of {step}, at least 64.")
    if size is None and has_windows(model):
        raise ConfigError(
            "MODEL.BACKBONE.NAME: a network with attention in windows can't be exported for every image size, as "
            f"torch.export can't follow its windows. Export it for one, --size HxW (multiples of {step}), or run the "
            "weights with knet_d2.load."
        )
    sides = {2: step * Dim("rows", min=2), 3: step * Dim("columns", min=2)}
    if step == 1:
        sides = {2: Dim("height", min=64), 3: Dim("width", min=64)}
    batch = Dim("batch", min=1)
    shapes = {"image": {0: batch, **({} if size else sides)}, "image_size": None, "output_size": None}
    if memory_shape(model) is not None:
        shapes |= {name: {0: batch} for name in MEMORY_INPUT_NAMES}
    inputs = example_inputs(model, getattr(torch, image_type), size)
    with torch.no_grad():
        return torch.export.export(ExportableKNet(model).eval(), (), inputs, dynamic_shapes=shapes, strict=False)


def export_metadata(
    cfg: CfgNode,
    classes: ClassTable,
    model: KNet,
    image_type: str = "uint8",
    size: tuple[int, int] | None = None,
) -> dict[str, str]:
    """What travels in an exported file: the model's description, its task and output, and how to prepare an image.

    Args:
        image_type, size: see :func:`trace`.

    Raises:
        ConfigError: the config asks for several passes.
    """
    if cfg.TEST.AUG.ENABLED:
        raise ConfigError("TEST.AUG.ENABLED = True: an exported model is one pass. Set it to False.")
    step = max(model.size_divisibility, 1)
    preprocessing = {
        "format": cfg.INPUT.FORMAT,
        # Of image files; [] stands for the range of their type, see knet_d2.data.pixels
        "value_range": list(cfg.INPUT.VALUE_RANGE),
        "image_type": image_type,
        # Arguments of Detectron2's ResizeShortestEdge, which uses Pillow's bilinear filter; 0: not resized
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "size_divisibility": step,
        "smallest_side": 2 * step if step > 1 else 64,
        # Height and width of every padded image; null: any
        "static_size": None if size is None else list(size),
    }
    memory = memory_shape(model)
    return {
        # Shape without the batch; only for models that have this input
        **({"memory": json.dumps(memory)} if memory is not None else {}),
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
    _copy_attended_values(program)
    deforms = bool(program.graph.find_nodes(op="call_function", target=torch.ops.torchvision.deform_conv2d.default))
    converted = torch.onnx.export(
        program,
        input_names=(*INPUT_NAMES, *(MEMORY_INPUT_NAMES if "memory" in metadata else ())),
        output_names=(*OUTPUT_NAMES[metadata["output"]], *(MEMORY_OUTPUT_NAMES if "memory" in metadata else ())),
        dynamo=True,
        verbose=False,
        # Files without this operator also run where version 19 is not known
        opset_version=DEFORM_CONV_OPSET if deforms else None,
        custom_translation_table={torch.ops.torchvision.deform_conv2d.default: _deform_conv} if deforms else None,
    )
    converted.model.metadata_props.update(metadata)
    content = converted.model_proto.SerializeToString()
    write_atomically(path, lambda f: f.write(content))


def _copy_attended_values(program: ExportedProgram) -> None:
    """Give the values of attention one layout in memory.

    The exporter decomposes a graph twice. In between, attention with a mask changes its layout, and a view of its
    values, which the first pass could make, fails in the second.
    """
    attention = torch.ops.aten.scaled_dot_product_attention.default
    for node in program.graph.find_nodes(op="call_function", target=attention):
        with program.graph.inserting_after(node):
            arguments = (node,), {"memory_format": torch.contiguous_format}
            copied = program.graph.call_function(torch.ops.aten.clone.default, *arguments)
        copied.meta = dict(node.meta)
        node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)


def _deform_conv(
    x,
    weight,
    offset,
    mask,
    bias,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
):
    """torchvision's operator in ONNX's, which orders offsets as it does."""
    from onnxscript import opset19

    return opset19.DeformConv(
        x,
        weight,
        offset,
        bias,
        mask if use_mask else None,
        strides=[stride_h, stride_w],
        pads=[pad_h, pad_w, pad_h, pad_w],
        dilations=[dilation_h, dilation_w],
        group=groups,
        offset_group=offset_groups,
    )


def save_pt2(program: ExportedProgram, path: str, metadata: dict[str, str]) -> None:
    """Write a traced model for torch.export.load, with the metadata as the extra file METADATA_FILE."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    write_atomically(path, lambda f: f.write(buffer.getvalue()))
