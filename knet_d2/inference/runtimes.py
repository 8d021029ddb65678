"""The programs that compute exported files: onnxruntime and OpenVINO, each as a function of arrays."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import CheckpointError, ConfigError
from ..export import ONNX_COMMAND

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Runtime(Protocol):
    """An opened ONNX file; it may be called by several threads at once.

    Attributes:
        metadata: the file's properties.
    """

    metadata: Mapping[str, str]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        """The outputs of the graph in their order."""
        ...


class OnnxRuntime:
    """A :class:`Runtime`. Device "cuda" needs the package onnxruntime-gpu."""

    def __init__(self, path: str, device: str):
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError(f"engine = 'onnxruntime': it is missing; {ONNX_COMMAND}.") from None
        provider = _PROVIDERS.get(device.partition(":")[0])
        if provider not in onnxruntime.get_available_providers():
            raise ConfigError(
                f"device = {device!r}: this onnxruntime can't use it (it has "
                f"{', '.join(onnxruntime.get_available_providers())}). Use device='cpu', or install onnxruntime-gpu."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=[provider])
        except Exception as error:  # onnxruntime's exceptions have no common type
            raise CheckpointError(
                f"{path}: onnxruntime {onnxruntime.__version__} can't open it ({_one_line(error)}). Export it again, "
                "or install a newer onnxruntime (CPUs: 1.31.1 has deformable convolutions, versions up to about 1.19 "
                "refuse them)."
            ) from error
        self.metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        return self._session.run(None, inputs)


class OpenVino:
    """A :class:`Runtime`. It computes in float32, also on processors where OpenVINO's own choice is bfloat16.

    The device is "cpu", or another of OpenVINO's, such as "gpu" for a graphics card of Intel.
    """

    def __init__(self, path: str, device: str):
        try:
            import openvino
        except ImportError:
            raise ConfigError("engine = 'openvino': it is missing; install it: pip install openvino.") from None
        core = openvino.Core()
        if device.upper() not in core.available_devices:
            devices = " or ".join(repr(name.lower()) for name in core.available_devices)
            raise ConfigError(f"device = {device!r}: this OpenVINO can't use it. Use {devices}.")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if device == "cpu":
            options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        try:
            model = core.read_model(path)
            self._compiled = core.compile_model(model, device.upper(), options)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: OpenVINO {openvino.__version__} can't open it ({_one_line(error)}). Use "
                "engine='onnxruntime', or export it again."
            ) from error
        has_metadata = model.has_rt_info(["framework"])
        self.metadata: Mapping[str, str] = model.get_rt_info(["framework"]).value if has_metadata else {}
        self._of_thread = threading.local()  # a request is computed by one thread at a time

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self._compiled.create_infer_request()
        return self._of_thread.request.infer(dict(inputs)).to_tuple()


RUNTIMES: dict[str, Callable[[str, str], Runtime]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


def open_runtime(engine: str, path: str, device: str) -> Runtime:
    """Open an ONNX file.

    Args:
        engine: one of RUNTIMES.
        device: "cpu", "cuda", ...

    Raises:
        CheckpointError: the file is missing or damaged.
        ConfigError: the engine is missing, or can't use the device.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: there is no such file. Correct the path.")
    return RUNTIMES[engine](path, device)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
