"""Fuzzing of weights files: PyTorch's two formats, pickles of arrays, safetensors, and checkpoints to resume from."""

import io
import json
import os
import pickle
import random
import struct
import zipfile
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from knet_d2.checkpoint import Checkpointer, load_file, read_description
from knet_d2.checkpoint.description import describe_model
from knet_d2.engine.train_step import TrainStep
from knet_d2.errors import KNetError

from .data import Reached, default_config
from .mutations import mutate_bytes, mutate_tree, odd_value

try:
    from safetensors.torch import save as save_safetensors
except ImportError:  # it is optional
    save_safetensors = None

FORMATS = ("zip", "legacy", "pickle", "crafted", "resume", *(["safetensors"] if save_safetensors else []))


class Part(nn.Module):
    """A model with a few parameters, with the names of a K-Net and its backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        self.cascade = nn.Linear(2, 3)


class Weights:
    may_take_memory = False

    def __init__(self, folder: str) -> None:
        self._folder = folder
        torch.manual_seed(0)
        self._marker = os.path.join(folder, "code_has_run")
        self._step = self._new_step()
        sum(p.sum() for p in self._step.model.parameters()).backward()
        self._step.optimizer.step()
        self._metadata = describe_model(_described_config())

    @staticmethod
    def _new_step() -> TrainStep:
        model = Part()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = TrainStep(model, optimizer, clip_gradients=lambda p: torch.zeros(()), seed=0)
        step.iter = 4
        return step

    def make(self, draw: random.Random) -> None:
        self._format = draw.choice(FORMATS)
        form = draw.random()
        content = self._content(draw, form)
        suffix = {"pickle": "pkl", "crafted": "pkl", "safetensors": "safetensors"}.get(self._format, "pth")
        name = "model_0000004" if self._format == "resume" else "weights"
        self._path = os.path.join(self._folder, f"{name}.{suffix}")
        data = _crafted_pickle(draw) if self._format == "crafted" else self._encode(content, draw, form)
        if form > 0.7:
            data = mutate_bytes(data, draw)
        with open(self._path, "wb") as f:
            f.write(data)

    def _content(self, draw: random.Random, form: float) -> dict[str, Any]:
        content: dict[str, Any] = {
            "model": dict(self._step.model.state_dict()),
            "metadata": dict(self._metadata),
            "iteration": 4,
        }
        if self._format == "resume":
            content["trainer"] = self._step.state_dict()
        if form < 0.5:
            content = mutate_tree(content, draw, draw.choice((1, 1, 2, 4)))
            if isinstance(content.get("model"), dict) and content["model"] and draw.random() < 0.5:
                content["model"][draw.choice(list(content["model"]))] = self._odd_entry(draw)
        elif form < 0.6:
            content["metadata"]["config"] = mutate_bytes(content["metadata"]["config"].encode(), draw).decode("latin1")
            classes = mutate_tree(json.loads(content["metadata"]["classes"]), draw, 1)
            content["metadata"]["classes"] = json.dumps(classes)
        return content

    def _odd_entry(self, draw: random.Random) -> Any:
        choices = (
            lambda: torch.zeros(draw.choice(((), (0,), (2, 3), (2, 3, 1, 1), (1, 3, 1, 1), (3, 2)))),
            lambda: torch.full((2, 3, 1, 1), float("nan")),
            lambda: torch.zeros(2, 3, 1, 1, dtype=draw.choice((torch.bool, torch.complex64, torch.int64))),
            lambda: torch.zeros(1).expand(2, 3, 1, 1),
            lambda: torch.zeros(1).expand(10**12),
            lambda: torch.zeros(2, 3).to_sparse(),
            lambda: torch.quantize_per_tensor(torch.zeros(2, 3, 1, 1), 0.1, 0, torch.qint8),
            lambda: torch.zeros(2, 3, 1, 1, device="meta"),
            lambda: nn.Parameter(torch.zeros(2, 3, 1, 1)),
            lambda: np.array(["a", None], dtype=object),
            lambda: np.zeros(2, dtype="datetime64[s]"),
            lambda: _Code(self._marker),
            lambda: odd_value(draw),
        )
        return draw.choice(choices)()

    def _encode(self, content: dict[str, Any], draw: random.Random, form: float) -> bytes:
        stream = io.BytesIO()
        if self._format == "pickle":
            pickle.dump(_as_arrays(content), stream, protocol=draw.choice((0, 2, 4)))
        elif self._format == "safetensors":
            model, metadata = (x if isinstance(x, dict) else {} for x in map(content.get, ("model", "metadata")))
            tensors = {k: v for k, v in model.items() if isinstance(v, torch.Tensor) and _is_plain(v)}
            texts = {k: str(v).encode(errors="replace").decode() for k, v in metadata.items()}
            data = save_safetensors(tensors, {"format": "pt", **texts})
            return _with_odd_header(data, draw) if 0.2 < form < 0.6 else data
        else:
            torch.save(content, stream, _use_new_zipfile_serialization=self._format != "legacy")
        data = stream.getvalue()
        return _with_odd_records(data, draw) if 0.6 < form < 0.7 and self._format in ("zip", "resume") else data

    def use(self, draw: random.Random, reached: Reached) -> None:
        try:
            self._read(draw, reached)
        finally:
            if os.path.exists(self._marker):
                os.remove(self._marker)
                raise RuntimeError("code in a weights file has run")

    def _read(self, draw: random.Random, reached: Reached) -> None:
        content = load_file(self._path)
        reached()
        try:
            read_description(content, self._path)
        except KNetError:
            pass  # most files have no description, but their weights may be valid
        if self._format == "resume":
            with open(os.path.join(self._folder, "last_checkpoint"), "w") as f:
                f.write(os.path.basename(self._path))
            step = self._new_step()
            Checkpointer(step.model, self._folder, trainer=step).resume_or_load("")
        else:
            partial = draw.random() < 0.5
            heuristics = "?matching_heuristics=True" if partial and draw.random() < 0.2 else ""
            Checkpointer(Part(), partial=partial).load(self._path + heuristics)


class _Code:
    """An object that creates a file when an unsafe reader unpickles it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return open, (self._path, "w")


def _described_config() -> CfgNode:
    cfg = default_config()
    cfg.MODEL.KNET.TASK, cfg.MODEL.KNET.NUM_THING_CLASSES = "instance", 2
    cfg.MODEL.KNET.THING_CATEGORY_IDS = [0, 1]
    return cfg


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether every format can store a tensor."""
    is_dense = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_contiguous()
    return is_dense and not tensor.is_quantized


def _as_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().numpy() if _is_plain(value) else None
    if isinstance(value, dict):
        return {key: _as_arrays(item) for key, item in value.items()}
    return [_as_arrays(item) for item in value] if isinstance(value, list) else value


_NAMES = (
    *("collections OrderedDict", "collections Counter", "_codecs encode", "numpy dtype", "numpy ndarray", "os mkdir"),
    *("numpy.core.multiarray _reconstruct", "numpy._core.multiarray scalar", "torch Size", "torch FloatStorage"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2"),
)


def _crafted_pickle(draw: random.Random) -> bytes:
    """Return a pickle of random opcodes; a reader of weights knows most of them, but not their order."""
    pieces = [
        b"(",
        b"t",
        b"R",
        b"b",
        b"]",
        b"}",
        b")",
        b"a",
        b"e",
        b"s",
        b"u",
        b"N",
        b"Q",
        b"\x85",
        b"\x86",
        b"\x87",
        b"0",
    ]
    pieces += [
        b"q\x00",
        b"h\x00",
        b"q\x01",
        b"h\x01",
        b"h\x00h\x00\x86q\x00",
        b"h\x01h\x01a",
        b"\x93",
        b"\x94",
        b"\x81",
    ]
    values = (0, 1, -1, 1 << 20, 1 << 40, "f4", "O8", "V8", "model", "storage", "latin1", 0.5, True, "x" * 1000)
    pieces += [pickle.dumps(value, 2)[2:-1] for value in values]
    pieces += [b"c" + name.replace(" ", "\n").encode() + b"\n" for name in _NAMES]
    array = pickle.dumps(np.zeros((2, 3), np.float32), 2)[2:-1]
    body = [draw.choice((array, *pieces * 3)) for _ in range(draw.choice((5, 30, 300)))]
    return b"\x80\x02" + b"".join(body) * draw.choice((1, 1, 50)) + b"."


def _with_odd_header(data: bytes, draw: random.Random) -> bytes:
    """Change the header (JSON) of a safetensors file, with a right length."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(mutate_tree(json.loads(data[8 : 8 + length]), draw, 1)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _with_odd_records(data: bytes, draw: random.Random) -> bytes:
    """Change a record of a PyTorch file, with right checksums."""
    source, stream = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    changed = draw.choice(source.namelist())
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in source.namelist():
            content = source.read(name)
            archive.writestr(name, mutate_bytes(content, draw) if name == changed else content)
    return stream.getvalue()
