"""8-bit integers in an exported file: onnxruntime's static quantisation of backbone, neck and static kernels.

The end layers, whose ranges are wide, and the cascade, which sums over pixels, stay in float32.
"""

import copy
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoint import write_atomically
from ..errors import ConfigError
from ..modeling.meta_arch import KNet
from .writing import ONNX_COMMAND

PARTS = ("backbone", "sem_seg_head")
# End layers of the static kernels' producer, where it has them
END_LAYERS = ("classifier", "instance_kernels")
# Clip is ReLU6
_ACTIVATIONS = ("Relu", "Clip")
_OPERATORS = ("Conv", *_ACTIVATIONS, "Add", "MaxPool")
_SCOPES = "pkg.torch.onnx.name_scopes"


class Quantization(NamedTuple):
    """What is quantised.

    Attributes:
        layers: names of the convolutions in the model that are.
        float_layers: names of those that are not.
        num_images: images of the calibration.
        reduce_range: whether weights have 7 bits.
    """

    layers: list[str]
    float_layers: list[str]
    num_images: int
    reduce_range: bool


def quantize(
    source: str,
    target: str,
    inputs: Iterable[Mapping[str, np.ndarray]],
    reduce_range: bool = True,
    excluded: Sequence[str] = (),
) -> Quantization:
    """Write an ONNX file of tools/export_model.py again, with convolutions in 8-bit integers (QDQ).

    Args:
        source, target: paths; the metadata stay, and get an entry "quantization".
        inputs: inputs of the graph for typical images, of which the ranges of activations are taken.
        reduce_range: weights of 7 bits, as sums of products of 8 bits saturate on processors without VNNI; results are
            then the same on every processor.
        excluded: beginnings of names of further modules that stay in float32, such as "backbone.bottom_up.stem".

    Raises:
        ConfigError: a package is missing, there is no image, the end layers can't be told by their names, or an
            excluded module is not found.
    """
    try:
        import onnx
        import onnxscript.optimizer
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    except ImportError:
        raise ConfigError(f"{target}: quantisation needs packages; {ONNX_COMMAND}.") from None

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items, self.count = iter(inputs), 0

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            item = next(self.items, None)
            self.count += item is not None
            return item

    # With norms folded into the weights, so that the weights are constants
    unlimited = 1 << 31
    model = onnxscript.optimizer.optimize(
        onnx.load(source), onnx_shape_inference=False, input_size_limit=unlimited, output_size_limit=unlimited
    )
    reader = Reader()
    chosen, layers, float_layers = [], [], []
    unknown = set(excluded)
    outputs: set[str] = set()  # of chosen convolutions
    for node, module in _modules(model):
        if node.op_type in _ACTIVATIONS and node.input[0] in outputs:
            chosen.append(node.name)  # the range of a convolution's output is then that behind its activation
            continue
        # Outside of the backbone, other operators make the feature that the update stages sum
        if node.op_type not in _OPERATORS or not module.startswith(PARTS if node.op_type == "Conv" else PARTS[0]):
            continue
        # What the producer computes itself, by weights that it arranges, are logits
        is_end = module in PARTS or module.startswith(tuple(f"{PARTS[1]}.{name}" for name in END_LAYERS))
        excluding = {name for name in excluded if module.startswith(name)}
        unknown -= excluding
        stays = is_end or bool(excluding)
        if not stays:
            chosen.append(node.name)
        if node.op_type == "Conv":
            (float_layers if stays else layers).append(module)
            outputs |= set() if stays else {node.output[0]}
    if unknown:
        raise ConfigError(f"--int8-float {min(unknown)}: no layer is named so. Layers: {', '.join(layers)}.")
    if not layers:
        raise ConfigError(f"{source}: no convolution of {' or '.join(PARTS)} is found by its name. Export it again.")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "int8.onnx")
        quantize_static(
            model,
            path,
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_quantize=chosen,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantized = onnx.load(path)
    if not reader.count:
        raise ConfigError(f"{target}: there is no image to calibrate with. Name some by --int8.")
    found = Quantization(layers, float_layers, reader.count, reduce_range)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(model.metadata_props)
    quantized.metadata_props.add(key="quantization", value=json.dumps(found._asdict()))
    write_atomically(target, lambda f: f.write(quantized.SerializeToString()))
    return found


def _modules(model: Any) -> Iterator[tuple[Any, str]]:
    """The nodes of a graph, and the module of the K-Net that each is from.

    That of a layer is told by its weights, as long as no norm is folded into them: other modules may compute it.
    """
    for node in model.graph.node:
        weight = node.input[1] if node.op_type == "Conv" else ""
        if weight.startswith("model.") and weight.endswith(".weight"):
            yield node, weight.removeprefix("model.").removesuffix(".weight")
            continue
        scopes = next((x.value for x in node.metadata_props if x.key == _SCOPES), "")
        # "['', 'model.backbone', 'model.backbone.fpn_lateral2', 'conv2d_110']"
        names = [name for name in scopes.strip("[]").replace("'", "").split(", ") if name.startswith("model.")]
        yield node, names[-1].removeprefix("model.") if names else ""


@torch.no_grad()
def share_of_operations(model: KNet, sample: Mapping[str, Any], layers: Iterable[str]) -> float:
    """The share of a model's multiply-adds for one image, without post-processing, that some layers have.

    Args:
        sample: an input of the model.
        layers: names of modules.
    """
    frozen = copy.deepcopy(model).requires_grad_(False)  # the counter hooks into gradients
    with FlopCounterMode(display=False) as counter:
        frozen([dict(sample)])
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    wanted = set(layers)
    of_layers = sum(count for name, count in counts.items() if name.removeprefix("KNet.") in wanted)
    return of_layers / counts["Global"]
