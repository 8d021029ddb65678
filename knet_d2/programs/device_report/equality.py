"""Part "equality": results on the device against those of the CPU in float64, with TF32 off."""

import copy
import importlib.util
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.structures import Instances
from torch import nn

from ...data.classes import class_table
from ...export import INPUT_NAMES, OUTPUT_NAMES, default_image_type, export_metadata, save_onnx, trace
from ...modeling.backbone.deform_conv import DeformConv2d
from ...modeling.postprocessing import ImageGeometry, cells, dense
from ...tasks import TASKS
from ..benchmark.filling import damp_residual_blocks, fill
from ..benchmark.measure import precision
from ..benchmark.models import Subject, build_subject
from .plan import Row, Setup, Step

MODELS = {
    "panoptic": "coco/panoptic/knet_r50_fpn_1x.yaml",
    "instance": "coco/instance/knet_r50_fpn_1x.yaml",
    "semantic": "ade20k/semantic/knet_fcn_r50_d8_80k.yaml",
}
# Largest relative differences from the CPU in float64. They are larger than rounding, because a mask's logit near 0 can
# change its sign: the pixel then enters or leaves the gathered sum, and all later stages change.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
GRADIENT_TOLERANCE = {
    "instance": {torch.float32: 5e-3, torch.float64: 1e-5},
    "panoptic": {torch.float32: 5e-3, torch.float64: 1e-5},
    # The decode heads' batch norm of few pixels per channel amplifies rounding
    "semantic": {torch.float32: 5e-2, torch.float64: 1e-5},
}
OPERATOR_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
# Share of pixels that may differ, since their probability is near the threshold of a mask
PIXEL_TOLERANCE = 1e-3
# Share of instances that may be matched with another kernel, since the costs of both are nearly equal
MATCH_TOLERANCE = {torch.float32: 0.05, torch.float64: 0.0}
# Share of pixels, and relative difference of scores, between a model and its exported graph
GRAPH_TOLERANCE = 1e-3


def steps(setup: Setup) -> Iterator[Step]:
    """Yield the comparisons that need no recordings."""
    yield Step("deformable convolution", partial(compare_deformable_convolution, setup))
    for task in MODELS:
        yield Step(f"{task}: training step", partial(compare_training_step, setup, task))
        yield Step(f"{task}: post-processing", partial(compare_results, setup, task))
    for task in setup.size.exported:
        yield Step(f"{task}: exported graph", partial(compare_graph, setup, task))


def row(check: str, dtype: torch.dtype | str, difference: float, tolerance: float, detail: str = "") -> Row:
    """Make a line of the table; NaN does not pass."""
    return {
        "check": check,
        "type": str(dtype).removeprefix("torch."),
        "difference": difference,
        "tolerance": tolerance,
        "passed": difference <= tolerance,
        "detail": detail,
    }


def precisions(device: torch.device) -> list[torch.dtype]:
    """Return the types that are compared; MPS has no float64."""
    return [torch.float32] if device.type == "mps" else [torch.float32, torch.float64]


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value; inf for NaN and for other shapes."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if found.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    scale = float(expected.abs().max()) or 1.0
    difference = float((found - expected).abs().max()) / scale
    return float("inf") if math.isnan(difference) else difference


def share_of_different(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the share of entries that differ, 0 to 1; 1 if the shapes differ."""
    if found.shape != expected.shape:
        return 1.0
    return float((found.cpu() != expected.cpu()).double().mean()) if found.numel() else 0.0


# ---- operators -------------------------------------------------------------------------------------------------


def compare_deformable_convolution(setup: Setup) -> list[Row]:
    """Compare the output and the gradients of a modulated deformable convolution."""
    torch.manual_seed(0)
    layer = DeformConv2d(16, 8, kernel_size=3, padding=1, bias=False, modulated=True, offset_groups=2).double()
    nn.init.normal_(layer.conv_offset.weight, std=0.1)
    x, weight = torch.randn(2, 16, 24, 32, dtype=torch.float64), torch.randn(2, 8, 24, 32, dtype=torch.float64)

    def run(dtype: torch.dtype, device: str | torch.device) -> list[torch.Tensor]:
        moved = copy.deepcopy(layer).to(device, dtype)
        inputs = x.to(device, dtype, copy=True).requires_grad_()
        output = moved(inputs)
        (output * weight.to(device, dtype)).sum().backward()
        return [y.detach().cpu().double() for y in (output, inputs.grad, *(p.grad for p in moved.parameters()))]

    expected, rows = run(torch.float64, "cpu"), []
    with precision("fp32", setup.device):
        for dtype in precisions(setup.device):
            worst = max(map(relative_difference, run(dtype, setup.device), expected))
            detail = "output and gradients of input, weights and offsets"
            rows.append(row("deformable convolution", dtype, worst, OPERATOR_TOLERANCE[dtype], detail))
    return rows


# ---- a model ---------------------------------------------------------------------------------------------------


def built_subject(setup: Setup, task: str) -> Subject:
    """Build a model on the CPU with random weights, in evaluation mode."""
    subject = build_subject(setup.spec(MODELS[task], "MODEL.KNET.DROPOUT=0.0"), "cpu")
    subject.model.eval()
    damp_residual_blocks(subject.model)
    return subject


def compare_training_step(setup: Setup, task: str) -> list[Row]:
    """Compare losses, matches and gradients of a batch of two images; losses and gradients with equal matches."""
    # Not filled: the large weights of a filled model amplify rounding
    subject = built_subject(setup, task)
    state = {name: value.clone() for name, value in subject.model.state_dict().items()}
    batch = subject.inputs(setup.size.compared_image, 2, setup.size.compared_image)

    def run(dtype: torch.dtype, device: str | torch.device, given: Sequence[Any] = ()) -> tuple[Any, ...]:
        model = subject.model.to(device, dtype).train()
        model.load_state_dict(state)  # the previous run changed the statistics of batch norm
        model.zero_grad()
        matches = _record_matches(model, given)
        losses = model(batch)
        sum(losses.values()).backward()
        del model.criterion.matcher.match  # the recording
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return *({str(key): value.detach().cpu() for key, value in x.items()} for x in (losses, gradients)), matches

    expected, rows = run(torch.float64, "cpu"), []
    with precision("fp32", setup.device):
        for dtype in precisions(setup.device):
            losses, gradients, matches = run(dtype, setup.device, expected[2])
            rows.append(_worst(f"{task}: losses", dtype, losses, expected[0], LOSS_TOLERANCE[dtype]))
            if matches:
                rows.append(_match_row(f"{task}: matches", dtype, _kernels(matches), _kernels(expected[2])))
            allowed = GRADIENT_TOLERANCE[task][dtype]
            rows.append(_gradient_row(f"{task}: gradients", dtype, gradients, expected[1], allowed))
    return rows


def _record_matches(model: Any, given: Sequence[Any]) -> list[Any]:
    """Return a list that gets the results of the matcher; the model goes on with ``given``, if there are any.

    Rounding changes the match of instances for which two kernels cost the same, and then their losses.
    """
    found: list[Any] = []
    matcher, others = model.criterion.matcher, iter(given)
    original = matcher.match

    def recording(*args: Any, **kwargs: Any) -> Any:
        found.append(original(*args, **kwargs))
        if not given:
            return found[-1]
        device = args[1][0].device
        return [[tuple(x.to(device) for x in match) for match in stage] for stage in next(others)]

    matcher.match = recording
    return found


def _kernels(results: Sequence[Any]) -> dict[int, torch.Tensor]:
    """The kernels of the instances of every image and stage, in the order of the instances."""
    matches = (match for stages in results for stage in stages for match in stage)
    return {i: kernels[instances.argsort()].cpu() for i, (kernels, instances) in enumerate(matches)}


def _match_row(check: str, dtype: torch.dtype, found: dict, expected: dict) -> Row:
    """Compare the kernels that the instances of all images and stages are matched with."""
    shapes = [{name: x.shape for name, x in matches.items()} for matches in (found, expected)]
    kernels = torch.cat(list(expected.values()))
    share = share_of_different(torch.cat(list(found.values())), kernels) if shapes[0] == shapes[1] else 1.0
    return row(check, dtype, share, MATCH_TOLERANCE[dtype], f"kernels of {len(kernels)} instances, all stages")


def _worst(check: str, dtype: torch.dtype, found: dict, expected: dict, tolerance: float) -> Row:
    """Compare tensors by name; the line names the worst of them."""
    if found.keys() != expected.keys():
        return row(check, dtype, float("inf"), tolerance, f"other names: {sorted(found.keys() ^ expected.keys())}")
    differences = {name: relative_difference(found[name], expected[name]) for name in expected}
    name = max(differences, key=lambda key: differences[key])
    return row(check, dtype, differences[name], tolerance, f"{len(expected)} compared, worst: {name}")


def _gradient_row(check: str, dtype: torch.dtype, found: dict, expected: dict, tolerance: float) -> Row:
    """Compare all gradients as one vector, by the length of the difference."""
    if found.keys() != expected.keys():
        return row(check, dtype, float("inf"), tolerance, "other parameters have a gradient")
    length = sum(float(x.double().square().sum()) for x in expected.values()) ** 0.5
    difference = sum(float((found[name].double() - x).square().sum()) for name, x in expected.items()) ** 0.5
    return row(check, dtype, difference / length, tolerance, f"of {len(expected)} parameters, norm {length:.4g}")


def compare_results(setup: Setup, task: str) -> list[Row]:
    """Compare both implementations of post-processing, dense on the device and cells on the CPU, on equal logits."""
    subject, (height, width) = built_subject(setup, task), setup.size.compared_image
    inputs = subject.inputs((height, width), 1, (height, width))
    fill(subject, inputs)  # so that its kernels differ in their masks and classes
    with torch.no_grad():
        (logits,) = subject.model(inputs, do_postprocess=False)
    geometry = ImageGeometry(logits.geometry.padded, logits.geometry.image, (height * 3 // 2, width * 3 // 2))
    classes, masks = logits.class_logits, logits.mask_logits
    processor, rows = subject.model.postprocessor, []
    for output in TASKS[task].outputs:
        expected = processor.tensors(output, classes, masks, geometry, processor.options, cells)
        processor.to(setup.device)
        moved = None if classes is None else classes.to(setup.device)
        found = processor.tensors(output, moved, masks.to(setup.device), geometry, processor.options, dense)
        processor.to("cpu")
        worst = max(map(_result_difference, found, expected))
        rows.append(row(f"{task}: {output}", torch.float32, worst, PIXEL_TOLERANCE, "of equal logits"))
    return rows


def _result_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Compare scores by their values; labels, masks and maps by the share of entries."""
    compare = relative_difference if expected.is_floating_point() else share_of_different
    return compare(found, expected)


# ---- exported graphs -------------------------------------------------------------------------------------------


def compare_graph(setup: Setup, task: str) -> list[Row]:
    """Compare the model on the CPU with its traced graph on the device, and with ONNX Runtime if it is installed."""
    subject = built_subject(setup, task)
    for stage in subject.model.cascade.stages:
        if stage.class_branch is not None:  # scores in all of (0, 1), so that results are not empty
            nn.init.normal_(stage.class_branch[-1].weight, std=0.1)
            nn.init.zeros_(stage.class_branch[-1].bias)
    model, size = subject.model, setup.size.compared_image
    step = max(model.size_divisibility, 1)
    padded = tuple(-(-length // step) * step for length in size)
    image = torch.zeros(1, 3, *padded)
    image[0, :, : size[0], : size[1]] = subject.inputs(size, 1, size)[0]["image"]
    inputs = dict(zip(INPUT_NAMES, (image.to(torch.uint8), torch.tensor(size), torch.tensor(size))))
    output = model.postprocessor.options.outputs[0]

    def on_device() -> list[torch.Tensor]:
        moved = model.to(setup.device)
        graph = trace(moved).module()
        with torch.no_grad():
            return [x.cpu() for x in graph(**{**inputs, "image": inputs["image"].to(setup.device)})]

    with torch.no_grad():
        expected = _graph_tensors(model([{"image": image[0, :, : size[0], : size[1]].to(torch.uint8)}])[0], output)
    with precision("fp32", setup.device):
        rows = [_graph_row(f"{task}: torch.export", on_device(), expected, output)]
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        found = _run_onnx(setup, subject, {name: value.numpy() for name, value in inputs.items()}, output)
        rows.append(_graph_row(f"{task}: ONNX Runtime", found, expected, output))
    return rows


def _run_onnx(setup: Setup, subject: Subject, inputs: dict[str, Any], output: str) -> list[torch.Tensor]:
    import onnxruntime

    path = str(setup.folder / f"{output}.onnx")
    model = subject.model.to("cpu")
    metadata = export_metadata(subject.cfg, class_table(subject.cfg), model, default_image_type(subject.cfg))
    save_onnx(trace(model), path, metadata)
    wanted = ["CUDAExecutionProvider"] if setup.device.type == "cuda" else []
    available = onnxruntime.get_available_providers()
    providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in available]
    session = onnxruntime.InferenceSession(path, providers=providers)
    return [torch.from_numpy(x) for x in session.run(list(OUTPUT_NAMES[output]), inputs)]


def _graph_tensors(result: dict[str, Any], output: str) -> dict[str, torch.Tensor]:
    """Return what is compared of a result: "pixels" (label map, or whether anything covers a pixel) and "scores"."""
    if output == "sem_seg":
        return {"pixels": result["sem_seg"].argmax(0)}
    if output == "panoptic_seg":
        segment_map, segments = result["panoptic_seg"]
        return {"pixels": segment_map > 0, "scores": torch.tensor([x["score"] for x in segments])}
    found: Instances = result["instances"]
    return {"pixels": found.pred_masks.any(0), "scores": found.scores}


def _graph_row(check: str, found: list[torch.Tensor], expected: dict[str, torch.Tensor], output: str) -> Row:
    tensors = dict(zip(OUTPUT_NAMES[output], (x[0] for x in found)))
    if output == "sem_seg":
        pixels = tensors["label_map"]
    elif output == "panoptic_seg":
        pixels = tensors["segment_map"] > 0
    else:
        pixels = tensors["masks"][: len(expected["scores"])].any(0)
    difference = share_of_different(pixels, expected["pixels"].to(pixels.dtype))
    detail = f"{pixels.numel()} pixels"
    if "scores" in expected:
        count = len(expected["scores"])
        scores = tensors["scores"][tensors["areas"] > 0] if "areas" in tensors else tensors["scores"][:count]
        difference = max(difference, relative_difference(scores, expected["scores"]))
        detail += f" and {count} scores"
    return row(check, torch.float32, difference, GRAPH_TOLERANCE, detail)
