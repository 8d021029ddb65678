"""Compare exported models with their PyTorch model, on images at several sizes and batch sizes.

For each file, size and batch size, this prints the largest difference of a score, the smallest IoU of a mask, the
smallest share of equal pixels in a map, the milliseconds per image, and the ratio to PyTorch's time. The exit code is 1
if scores differ by more than 1e-4, the IoU of masks is below 0.999, or less than 99.9 % of the pixels of a map are
equal.

If a mask logit is nearly 0, rounding alone decides whether its pixel is gathered into the group feature of the kernel,
and all later results differ a little. Images with such a logit, closer to 0 than float32 and float64 differ, are left
out of these metrics. They are counted, and their metrics are printed in a separate line. Where the result of such an
image is out of bounds, the logit is moved to the other side of 0 in the PyTorch model: if this gives the file's result
for one of the logits, the difference is explained; else it is a failure as any other.
"""

import argparse
import contextlib
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import nn

from knet_d2.data.files import find_images, read_image
from knet_d2.data.pixels import PixelFormat
from knet_d2.errors import ConfigError
from knet_d2.export import INPUT_NAMES, MEMORY_INPUT_NAMES, OUTPUT_NAMES, default_image_type, memory_shape
from knet_d2.modeling.meta_arch import KNet
from knet_d2.programs import run
from knet_d2.programs.arguments import add_config_arguments, load_predictor

SIZES = ((128, 128), (96, 160), (100, 140), (150, 90))
BATCHES = (1, 2)
MAX_SCORE_DIFFERENCE = 1e-4
MIN_IOU = 0.999
MIN_EQUAL = 0.999
# Gates of an image that are moved
MOST_GATES = 50

Tensors = dict[str, np.ndarray]
Runner = Callable[[np.ndarray, np.ndarray, np.ndarray], Tensors]


class Gate(NamedTuple):
    """A mask logit that decides whether a pixel is gathered for a kernel, and that is 0 within float32 rounding.

    Attributes:
        stage: number of the update stage that gathers, from 0.
        position: index in the mask logits [N, H, W], flattened.
    """

    stage: int
    position: int


class Agreement(NamedTuple):
    """The agreement of two results for one image.

    Attributes:
        score_difference: largest difference of a score.
        iou: smallest IoU of a mask.
        equal: share of equal pixels of a map, 0 to 1.
    """

    score_difference: float = 0.0
    iou: float = 1.0
    equal: float = 1.0

    @property
    def is_good(self) -> bool:
        return self.score_difference <= MAX_SCORE_DIFFERENCE and self.iou >= MIN_IOU and self.equal >= MIN_EQUAL


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="the trained model")
    parser.add_argument("exported", nargs="+", help="exported .onnx and .pt2 files of this model")
    parser.add_argument("--images", nargs="+", required=True, help="image files, folders, or quoted patterns")
    parser.add_argument("--number", type=int, default=20, help="number of images at each size")
    parser.add_argument("--sizes", nargs="+", metavar="HxW", default=[f"{h}x{w}" for h, w in SIZES])
    parser.add_argument("--image-type", choices=("uint8", "float32"), help="the same as in the export")
    parser.add_argument("--confidence-threshold", type=float, default=0.3, help="the same as in the export")
    add_config_arguments(parser)
    return parser


def open_exported(path: str, output: str, memory: tuple[int, int] | None = None) -> Runner:
    """Open an exported model; returns a function that maps the inputs of the graph to its outputs by name.

    Args:
        memory: :func:`memory_shape` of the model. Images are the first frames of videos.
    """

    def named(*inputs: np.ndarray) -> Tensors:
        found = dict(zip(INPUT_NAMES, inputs))
        if memory is not None:
            batch = len(inputs[0])
            found |= zip(MEMORY_INPUT_NAMES, (np.zeros((batch, *memory), np.float32), np.zeros(batch, bool)))
        return found

    if path.endswith(".onnx"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [x.name for x in session.get_outputs()]

        def run(*inputs: np.ndarray) -> Tensors:
            return dict(zip(names, session.run(None, named(*inputs))))

        return run
    if not path.endswith(".pt2"):
        raise ConfigError(f"{path}: not an exported model. Name a file that ends in .onnx or .pt2.")
    module = torch.export.load(path).module()

    def run_program(*inputs: np.ndarray) -> Tensors:
        tensors = {name: torch.from_numpy(x) for name, x in named(*inputs).items()}
        with torch.inference_mode():
            outputs = module(**tensors)
        return {name: value.numpy() for name, value in zip(OUTPUT_NAMES[output], outputs)}

    return run_program


def run_model(model: KNet, images: np.ndarray, output_size: tuple[int, int]) -> list[Tensors]:
    """Run the PyTorch model on images [B, C, H, W]; returns the outputs of each image in the format of the graph."""
    height, width = map(int, output_size)
    inputs = [{"image": torch.from_numpy(image), "height": height, "width": width} for image in images]
    with torch.inference_mode():
        results = model(inputs)
    return [
        _as_tensors(result, model.postprocessor.options.outputs[0], model.postprocessor.category_ids)
        for result in results
    ]


def _as_tensors(result: dict, output: str, category_ids: list[int]) -> Tensors:
    if output == "sem_seg":
        return {"label_map": result[output].argmax(dim=0).numpy()}
    if output == "instances":
        found = result[output]
        columns = found.scores, found.pred_classes, found.pred_boxes.tensor, found.pred_masks
        return {name: value.numpy() for name, value in zip(OUTPUT_NAMES[output], columns)}
    segment_map, info = result[output]
    return {
        "segment_map": segment_map.numpy(),
        "scores": np.array([x["score"] for x in info], np.float32),
        "labels": np.array([category_ids.index(x["category_id"]) for x in info], np.int64),
        "areas": np.array([x["area"] for x in info], np.int64),
    }


def agreement(expected: Tensors, found: Tensors, score_threshold: float) -> Agreement:
    """Compare the results for one image of PyTorch (expected) and of an exported model (found)."""
    if "label_map" in expected:
        return Agreement(equal=float((expected["label_map"] == found["label_map"]).mean()))
    if "masks" in expected:
        return _instance_agreement(expected, found, score_threshold)
    return _panoptic_agreement(expected, found)


def _instance_agreement(expected: Tensors, found: Tensors, score_threshold: float) -> Agreement:
    """Compare instances, which are matched by class and score; of several with nearly equal scores, the best mask."""
    scores = found["scores"]
    free = set(np.flatnonzero(scores >= score_threshold - MAX_SCORE_DIFFERENCE).tolist())
    score_difference, lowest_iou = 0.0, 1.0
    for label, score, mask in zip(expected["labels"], expected["scores"], expected["masks"]):
        near = [i for i in free if found["labels"][i] == label and abs(scores[i] - score) <= MAX_SCORE_DIFFERENCE]
        if not near:
            return Agreement(score_difference=1.0, iou=0.0)
        ious = [_iou(mask, found["masks"][i]) for i in near]
        best = int(np.argmax(ious))
        free.remove(near[best])
        lowest_iou = min(lowest_iou, ious[best])
        score_difference = max(score_difference, float(abs(scores[near[best]] - score)))
    if any(scores[i] >= score_threshold + MAX_SCORE_DIFFERENCE for i in free):
        return Agreement(score_difference=1.0, iou=0.0)
    return Agreement(score_difference, lowest_iou)


def _panoptic_agreement(expected: Tensors, found: Tensors) -> Agreement:
    """Compare panoptic maps; segments are matched in the order of their scores."""
    count = len(expected["scores"])
    if int((found["areas"] > 0).sum()) != count or (found["labels"][:count] != expected["labels"]).any():
        return Agreement(score_difference=1.0, iou=0.0, equal=0.0)
    difference = float(np.abs(expected["scores"] - found["scores"][:count]).max(initial=0))
    maps = expected["segment_map"], found["segment_map"]
    lowest_iou = min((_iou(maps[0] == i, maps[1] == i) for i in range(1, count + 1)), default=1.0)
    return Agreement(difference, lowest_iou, float((maps[0] == maps[1]).mean()))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def find_gates(model: KNet, exact: KNet, image: np.ndarray) -> list[Gate]:
    """The mask logits of an image that are 0 within float32 rounding and select pixels for a kernel.

    Args:
        exact: the model in float64.
    """
    if model.bank.num_matched == 0:
        return []
    logits, exact_logits = (_gating_logits(x, image) for x in (model, exact))
    found = []
    for stage, (rounded, reference) in enumerate(zip(logits, exact_logits)):
        noise = (rounded - reference).abs().max()
        positions = (reference.abs() <= 2 * noise).flatten().nonzero()[:, 0]
        found += [Gate(stage, position) for position in positions.tolist()]
    return found


@contextlib.contextmanager
def moved(model: KNet, gate: Gate) -> Iterator[None]:
    """While this is open, the logit of a gate is on the other side of 0, for models that run one image."""

    def move(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        feature, kernels, mask_logits = inputs
        mask_logits = mask_logits.clone(memory_format=torch.contiguous_format)
        values = mask_logits.view(-1)
        smallest = torch.finfo(values.dtype).tiny
        values[gate.position] = -smallest if values[gate.position] > 0 else smallest
        return feature, kernels, mask_logits

    handle = model.cascade.stages[gate.stage].register_forward_pre_hook(move)
    try:
        yield
    finally:
        handle.remove()


def is_explained(
    model: KNet, gates: Sequence[Gate], image: np.ndarray, output_size: np.ndarray, found: Tensors, threshold: float
) -> bool:
    """Whether the result of an exported model is PyTorch's with one of the gates moved."""
    for gate in gates[:MOST_GATES]:
        with moved(model, gate):
            (expected,) = run_model(model, image[None], output_size)
        if agreement(expected, found, threshold).is_good:
            return True
    return False


def _gating_logits(model: KNet, image: np.ndarray) -> list[torch.Tensor]:
    with torch.inference_mode():
        state = model.sem_seg_head(model.backbone(model.preprocess_image([{"image": torch.from_numpy(image)}]).tensor))
        stages = model.cascade(state)
    return [x.mask_logits.double() for x in (state, *stages[:-1])]


def read_images(files: Sequence[str], size: tuple[int, int], pixel_format: PixelFormat, image_type: str) -> np.ndarray:
    """Read images and resize them to one size; returns [n, channels, H, W] of image_type, "uint8" or "float32"."""
    resized = [cv2.resize(read_image(path, pixel_format), size[::-1]) for path in files]
    # OpenCV drops the axis of a single channel.
    images = np.stack([x.reshape(*size, pixel_format.channels).transpose(2, 0, 1) for x in resized])
    return np.rint(images).astype(image_type) if image_type == "uint8" else images.astype(image_type)


def padded(images: np.ndarray, step: int) -> np.ndarray:
    """Pad images with zeros at the bottom and right, to multiples of ``step``."""
    height, width = (-length % max(step, 1) for length in images.shape[2:])
    return np.pad(images, ((0, 0), (0, 0), (0, height), (0, width)))


class Row(NamedTuple):
    """The results of one file for images of one size in batches of one size.

    Attributes:
        file: path of the file.
        size: (height, width) of the images.
        batch: number of images in a batch.
        kept: worst agreement of the images without a gating logit at 0.
        left_out: worst agreement of the images with a gating logit at 0.
        num_images, num_left_out: number of images, and of those left out.
        num_explained, num_unexplained: those left out whose results are out of bounds, with and without a gate that
            explains it.
        seconds, pytorch_seconds: median time per image of the file and of PyTorch.
    """

    file: str
    size: tuple[int, int]
    batch: int
    kept: Agreement
    left_out: Agreement
    num_images: int
    num_left_out: int
    num_explained: int
    num_unexplained: int
    seconds: float
    pytorch_seconds: float

    @property
    def is_good(self) -> bool:
        return self.kept.is_good and not self.num_unexplained


ROW = "{:24} {:>9} {:>5} {:>6} {:>8} {:>10} {:>8} {:>9} {:>8} {:>9}"
HEADER = ROW.format("file", "size", "batch", "images", "left out", "scores", "IoU", "equal", "ms", "x PyTorch")


def format_row(row: Row) -> str:
    size, latency = "x".join(map(str, row.size)), f"{1000 * row.seconds:.1f}"
    ratio = f"{row.seconds / row.pytorch_seconds:.2f}"
    start = os.path.basename(row.file), size, row.batch, row.num_images, row.num_left_out
    return ROW.format(*start, *_format_agreement(row.kept), latency, ratio)


def _format_agreement(x: Agreement) -> tuple[str, str, str]:
    return f"{x.score_difference:.1e}", f"{x.iou:.5f}", f"{x.equal:.3%}"


def worst(results: Sequence[Agreement]) -> Agreement:
    """Return the worst value of each metric."""
    if not results:
        return Agreement()
    differences, ious, parts = zip(*results)
    return Agreement(max(differences), min(ious), min(parts))


def compare(
    model: KNet,
    runners: dict[str, Runner],
    images: np.ndarray,
    gates: Sequence[Sequence[Gate]],
    batch: int,
    threshold: float,
) -> Iterator[Row]:
    """Run all models on images of one size, [n, C, H, W], and request results of another size.

    Args:
        model: the PyTorch model.
        runners: functions of the exported models, by path.
        images: the images.
        gates: of each image.
        batch: number of images in a batch.
        threshold: lowest score of an instance.
    """
    size = images.shape[2:]
    output_size = np.array([size[0] * 3 // 2, size[1] * 5 // 4])
    seconds: dict[str, list[float]] = {name: [] for name in ("", *runners)}
    found: dict[str, list[Agreement]] = {name: [] for name in runners}
    explained: dict[str, list[bool]] = {name: [] for name in runners}
    starts = range(0, len(images) - batch + 1, batch)
    for start in starts:
        some = images[start : start + batch]
        inputs = padded(some, model.size_divisibility), np.array(size), output_size
        expected, time_of_model = _timed(run_model, model, some, output_size)
        seconds[""].append(time_of_model / batch)
        for name, runner in runners.items():
            outputs, time_of_file = _timed(runner, *inputs)
            seconds[name].append(time_of_file / batch)
            for i, one in enumerate(expected):
                result = {key: x[i] for key, x in outputs.items()}
                found[name].append(agreement(one, result, threshold))
                near = gates[start + i]
                if near and not found[name][-1].is_good:
                    explained[name].append(is_explained(model, near, some[i], output_size, result, threshold))
    for name, results in found.items():
        parts = [[x for x, near in zip(results, gates) if bool(near) == wanted] for wanted in (False, True)]
        reasons = explained[name]
        counts = len(results), len(parts[1]), sum(reasons), len(reasons) - sum(reasons)
        medians = statistics.median(seconds[name]), statistics.median(seconds[""])
        yield Row(name, size, batch, *map(worst, parts), *counts, *medians)


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call(*arguments)
    return result, time.perf_counter() - start


def main(args: argparse.Namespace) -> int:
    predictor = load_predictor(args.weights, args, device="cpu")
    model, pixel_format = predictor.model, predictor.pixel_format
    image_type = args.image_type or default_image_type(predictor.cfg)
    exact = copy.deepcopy(model).double()
    output, memory = model.postprocessor.options.outputs[0], memory_shape(model)
    runners = {path: open_exported(path, output, memory) for path in args.exported}
    files = find_images(args.images)[: args.number]
    print(f"{predictor.cfg.MODEL.KNET.TASK} model, {model.postprocessor.options.outputs[0]}\n{HEADER}")
    rows = []
    for text in args.sizes:
        images = read_images(files, tuple(map(int, text.split("x"))), pixel_format, image_type)
        gates = [find_gates(model, exact, image) for image in images]
        for batch in BATCHES:
            for row in compare(model, runners, images, gates, batch, args.confidence_threshold):
                print(format_row(row), flush=True)
                rows.append(row)
    for path in runners:
        own = [x for x in rows if x.file == path]
        numbers = _format_agreement(worst([x.left_out for x in own]))
        print("{}: images left out: scores {}, IoU {}, equal {}".format(path, *numbers))
        counts = sum(x.num_explained for x in own), sum(x.num_unexplained for x in own)
        print("{}: of these out of bounds: {} explained by one moved logit, {} not".format(path, *counts))
    num_bad = sum(not x.is_good for x in rows)
    print(f"{num_bad} of {len(rows)} rows out of bounds")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
