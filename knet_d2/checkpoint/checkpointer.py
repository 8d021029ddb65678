"""Detectron2's checkpointer with atomic writing, safe reading and errors instead of warnings where nothing fits."""

import errno
import http.client
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import nn

from ..errors import CheckpointError, KNetError
from .fit import find_misfits
from .layouts import Layout, recognise
from .load_report import LoadReport, build_report
from .loading import as_checkpoint, load_file
from .resume import newest_whole_checkpoint, resumable_checkpoints
from .zoo import fitting_hint

_HEURISTICS = "?matching_heuristics=True"
# Where less is free, a disk counts as full: its last blocks can be too few for what was to be written
_FULL_DISK_BYTES = 1 << 20


def write_atomically(path: str, write: Callable[[Any], None], mode: str = "wb") -> None:
    """Let ``write`` fill a temporary file beside ``path`` and rename it; ``path`` is the old or the new file, whole."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as f:
            try:
                write(f)
            except RuntimeError as e:  # PyTorch's writer does not say that the disk is full
                if shutil.disk_usage(folder).free >= _FULL_DISK_BYTES:
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from e
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpointer(DetectionCheckpointer):
    """Saves and loads the model and, in training, the trainer's state; the main process writes.

    It reads our own files, official K-Nets and pretrained backbones, whatever the file is called. ``report`` says what
    became of every parameter of the last file.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        partial: bool = False,
        metadata: dict[str, str] | None = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        """
        Args:
            partial: True where a training starts: weights for another number of classes or kernels, or for the
                backbone alone, will do, and the rest keeps its initialisation. False: each parameter must be there.
            metadata: written into every file, see :func:`describe_model`.
            save_dir, save_to_disk, checkpointables: see Detectron2's.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.partial = partial
        self.metadata = metadata or {}
        self.report: LoadReport | None = None

    def save(self, name: str, tag: bool = True, **extra: Any) -> None:
        """Write ``{name}.pth`` such that a reader finds the previous file or the whole new one.

        Args:
            tag: False leaves the file that a resumed run continues from as it is.
            extra: more entries of the file.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {
            "model": self.model.state_dict(),
            "metadata": self.metadata,
            **{k: v.state_dict() for k, v in self.checkpointables.items()},
            **extra,
        }
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            write_atomically(path, lambda f: torch.save(data, f))
            if tag:
                self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as e:
            raise CheckpointError(
                f"{path}: the checkpoint can't be written ({e}). Earlier checkpoints are intact."
            ) from e

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda f: f.write(last_filename_basename), mode="w")

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See Detectron2's; ``path`` may end in "?matching_heuristics=True" for weights with other names."""
        path, self._guess_names = path.removesuffix(_HEURISTICS), path.endswith(_HEURISTICS)
        if path and "://" not in path and not self.path_manager.isfile(path):
            raise CheckpointError(f"{path}: there is no such weights file. Check MODEL.WEIGHTS.")
        try:
            # Detectron2's main branch would take the address apart and lose the slashes of an absolute path in it
            local = self.path_manager.get_local_path(path) if path else path
            return super().load(local, *args, **kwargs)
        except KNetError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as e:
            raise CheckpointError(f"{path}: does not fit this model or its optimiser. {e}") from e
        except (OSError, http.client.HTTPException) as e:
            if "://" not in path:
                raise
            raise CheckpointError(
                f"{path}: can't be downloaded ({e or type(e).__name__}). Without network, get the file by other means "
                "and name it in MODEL.WEIGHTS."
            ) from e
        finally:
            self._parsed_url_during_load = None  # else Detectron2 refuses to load again after a failure

    def has_checkpoint(self) -> bool:
        return bool(resumable_checkpoints(self.save_dir))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """See Detectron2's; a damaged last checkpoint is passed over, with a warning, for the one before."""
        last = newest_whole_checkpoint(self.save_dir) if resume else None
        if last is None:
            return self.load(path, checkpointables=[])
        self.partial = False
        rest = self.load(last)
        unread = [key for key in self.checkpointables if key in rest]
        if unread:
            raise CheckpointError(f"{last}: {unread} could not be restored.")
        return rest

    def _load_file(self, f: str) -> dict[str, Any]:
        checkpoint = as_checkpoint(load_file(f), f)
        checkpoint["file"] = f
        if self._guess_names:
            checkpoint["matching_heuristics"] = True
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        """Translate, check and load the parameters, and log what became of each (instead of returning it)."""
        path, state_dict = checkpoint.pop("file"), checkpoint["model"]
        guess, author = checkpoint.pop("matching_heuristics", False), checkpoint.get("__author__")
        model_state = self.model.state_dict()
        layout = recognise(state_dict, model_state)
        if guess and layout.scope == "unknown":
            state_dict = align_and_update_state_dicts(model_state, state_dict, c2_conversion=author == "Caffe2")
            layout = recognise(state_dict, model_state)
        self.report = build_report(layout, state_dict, model_state)
        self._check_fit(path, layout)
        checkpoint["model"] = layout.translation.state_dict
        super()._load_model(checkpoint)
        log = self.logger.warning if self.report.other_shape or self.report.missing else self.logger.info
        log(f"{path}\n{self.report.as_text()}")

    def _check_fit(self, path: str, layout: Layout) -> None:
        reasons = find_misfits(self.report, layout, self.partial)
        if self.report.loaded and not reasons:
            return
        hint = fitting_hint(layout.translation.state_dict) if layout.scope == "model" else ""
        if self.report.loaded:
            raise CheckpointError(f"{path} ({layout.name}) does not fit this config: {'; '.join(reasons)}.{hint}")
        number = len(layout.translation.state_dict) + len(self.report.ignored) + len(layout.translation.unknown)
        raise CheckpointError(
            f"{path}: none of the {number} parameters in the weights file fits this model; "
            f"check MODEL.WEIGHTS against the config (it is a checkpoint of another model).{hint}"
        )
