"""Exported models behind the interface of the predictor, computed by onnxruntime or OpenVINO in place of PyTorch."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..checkpoint.description import LARGEST_SIZE, read_metadata
from ..checkpoint.download import cache_folder
from ..checkpoint.loading import split_options
from ..data.augmentation import Resize
from ..data.classes import ClassTable
from ..data.pixels import PixelFormat
from ..errors import CheckpointError, DataError
from ..export import OUTPUT_NAMES, default_image_type, export_metadata, save_onnx, trace
from ..modeling.meta_arch import KNet
from ..modeling.postprocessing import as_result
from ..modeling.postprocessing.scores import SUPPRESSED
from ..setup.dependencies import VERSION
from .batches import in_groups
from .detectron2_predictor import Predictor, check_padding, resized_sample
from .runtimes import open_runtime


class OnnxPredictor:
    """An ONNX file of tools/export_model.py, called as :class:`Predictor` is.

    Attributes:
        name: of the engine.
        cfg: config of the model; it says what the file computes, and changes nothing any more.
        pixel_format, classes: see :class:`Predictor`.
        outputs: the one result that the file gives.
        network: None; what needs PyTorch's model can't be done.
    """

    network: KNet | None = None
    outputs: tuple[str, ...]

    def __init__(self, path: str, device: str = "cpu", engine: str = "onnxruntime"):
        """
        Args:
            engine, device: see :func:`open_runtime`.

        Raises:
            CheckpointError: the file is missing, or not one of tools/export_model.py.
            ConfigError: the engine is missing, or can't use the device.
        """
        self.name, self._runtime = engine, open_runtime(engine, path, device)
        metadata = self._runtime.metadata
        if "preprocessing" not in metadata:
            raise CheckpointError(f"{path}: not a file of knet export. Export the model with it.")
        self.cfg, self.classes = read_metadata(metadata, path)
        self.cfg.MODEL.WEIGHTS = path
        self.pixel_format = PixelFormat.from_config(self.cfg)
        self.outputs, self._preprocessing, self._memory = checked_metadata(metadata, path)
        shorter, longer = self._preprocessing["min_size"], self._preprocessing["max_size"]
        self._resize = Resize([shorter, shorter], longer)

    def sample(self, image: np.ndarray, pad_to: tuple[int, int] | None = None) -> dict[str, Any]:
        """See :meth:`Predictor.sample`; "padded_size" is the size of the graph's input."""
        sample = resized_sample(image, self._resize)
        size = tuple(sample["image"].shape[1:])
        step, smallest = self._preprocessing["size_divisibility"], self._preprocessing["smallest_side"]
        if pad_to is not None:
            check_padding(pad_to, size, takes_padding=step > 1)
        static_size = self._preprocessing.get("static_size")
        if static_size:
            check_static_size(size, tuple(static_size), takes_padding=step > 1)
            pad_to, step, smallest = static_size, 1, 1
        sides = zip(size, pad_to or (0, 0))
        return {**sample, "padded_size": tuple(max(-(-max(x) // step) * step, smallest) for x in sides)}

    def predict(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """See :meth:`Predictor.predict`; of semantic models, a result is the label map, [H, W].

        The sizes are inputs of the graph, so images of equal sizes before and after resizing are computed together.
        """
        return in_groups(self._run, samples, lambda x: (x["image"].shape, x["height"], x["width"], x["padded_size"]))

    def _run(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        output_size = (samples[0]["height"], samples[0]["width"])
        tensors = map(torch.from_numpy, self._runtime(self.inputs(samples)))
        found = dict(zip(OUTPUT_NAMES[self.outputs[0]], tensors))
        labels = found.get("labels", torch.empty(0))  # label maps may have a label for what is of no class
        if labels.numel() and not 0 <= labels.min() <= labels.max() < len(self.classes.names):
            raise CheckpointError(
                f"{self.cfg.MODEL.WEIGHTS}: gives labels from {labels.min()} to {labels.max()}, but names "
                f"{len(self.classes.names)} classes. Export the model again."
            )
        return [self._result({name: x[i] for name, x in found.items()}, output_size) for i in range(len(samples))]

    def inputs(self, samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """The inputs of the graph for samples of one kind."""
        first = samples[0]
        size, output_size = first["image"].shape[1:], (first["height"], first["width"])
        images = np.stack([x["image"].numpy() for x in samples])
        if self._preprocessing["image_type"] == "uint8" and images.dtype != np.uint8:
            images = np.rint(images)
        padding = [(0, padded - length) for length, padded in zip(size, first["padded_size"])]
        images = np.pad(images, ((0, 0), (0, 0), *padding)).astype(self._preprocessing["image_type"])
        sizes = {"image_size": np.array(size, np.int64), "output_size": np.array(output_size, np.int64)}
        memory = {}
        if self._memory:  # images are first frames
            memory = {"memory_kernels": np.zeros((len(samples), *self._memory), np.float32)}
            memory["has_memory"] = np.zeros(len(samples), bool)
        return {"image": images, **sizes, **memory}

    def _result(self, found: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, Any]:
        output = self.outputs[0]
        if output == "instances":
            kept = (found["scores"] >= self.cfg.MODEL.KNET.TEST.SCORE_THRESHOLD) & (found["scores"] > SUPPRESSED)
            found = {name: x[kept] for name, x in found.items()}
        classes = self.classes
        return {output: as_result(output, [*found.values()], size, classes.num_things, classes.category_ids)}


def checked_metadata(metadata: Mapping[str, str], path: str) -> tuple[tuple[str], dict[str, Any], list[int] | None]:
    """The output, the preprocessing and the shape of the memory that an exported file states.

    Raises:
        CheckpointError: they make no sense, or would need memory without limit.
    """
    try:
        preprocessing = json.loads(metadata["preprocessing"])
        memory, output = json.loads(metadata.get("memory", "null")), metadata["output"]
        sides = [*(preprocessing.get("static_size") or []), preprocessing["smallest_side"]]
        sides += [preprocessing["size_divisibility"], *(memory or [])]
        is_usable = (
            output in OUTPUT_NAMES
            and preprocessing["image_type"] in ("uint8", "float32")
            and all(type(preprocessing[key]) is int and preprocessing[key] >= 0 for key in ("min_size", "max_size"))
            and preprocessing["min_size"] <= LARGEST_SIZE
            and all(type(x) is int and 0 < x <= LARGEST_SIZE for x in sides)
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_usable = False
    if not is_usable:
        raise CheckpointError(f"{path}: what it states of its images or its output makes no sense. Export it again.")
    return (output,), preprocessing, memory


def check_static_size(size: tuple[int, ...], static_size: tuple[int, ...], takes_padding: bool) -> None:
    """Check that a resized image fits into the one size of an exported file.

    Raises:
        DataError: it does not.
    """
    if any(a > b for a, b in zip(size, static_size)) or (size != static_size and not takes_padding):
        raise DataError(
            f"The image is resized to {size[0]} x {size[1]} pixels (height x width), but the file was exported for "
            f"{'up to' if takes_padding else 'exactly'} {static_size[0]} x {static_size[1]}. Export it with another "
            "--size."
        )


def exported_file(cfg: CfgNode, classes: ClassTable) -> str:
    """Return the path of a model's ONNX file in the cache (below FVCORE_CACHE); it is exported on first use.

    Args:
        cfg: with MODEL.WEIGHTS.
        classes: of the model, see :class:`.ImagePredictor`.

    Raises:
        ConfigError: the model can't be exported, or a package is missing.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    key = hashlib.sha256(f"{VERSION} {torch.__version__} {cfg.dump()} {classes}".encode())
    weights = split_options(cfg.MODEL.WEIGHTS)[0]
    with open(PathManager.get_local_path(weights), "rb") as f:
        key.update(hashlib.file_digest(f, "sha256").digest())
    path = os.path.join(cache_folder(), "exported", f"{key.hexdigest()[:32]}.onnx")
    if not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        predictor = Predictor(cfg)
        image_type = default_image_type(cfg)
        named = classes.named_like(predictor.classes)
        metadata = export_metadata(cfg, named, predictor.network, image_type)
        save_onnx(trace(predictor.network, image_type), path, metadata)
    return path
