"""Detectron2's checkpointer with atomic writing, safe reading and errors instead of warnings where nothing fits."""

import os
from typing import Any, Callable, Dict

import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..errors import CheckpointError, KNetError
from .loading import as_checkpoint, load_file

_HEURISTICS = "?matching_heuristics=True"


def write_atomically(path: str, write: Callable[[Any], None], mode: str = "wb") -> None:
    """Let ``write`` fill a temporary file beside ``path`` and rename it; ``path`` is the old or the new file, whole."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as f:
            write(f)
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
    """Saves and loads the model and, in training, the trainer's state; the main process writes."""

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
            **{k: v.state_dict() for k, v in self.checkpointables.items()},
            **extra,
        }
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            write_atomically(path, lambda f: torch.save(data, f))
            if tag:
                self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as e:  # PyTorch's writer turns a full disk into a RuntimeError
            raise CheckpointError(
                f"{path}: the checkpoint can't be written ({e}). Earlier checkpoints are intact."
            ) from e

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda f: f.write(last_filename_basename), mode="w")

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """See Detectron2's; ``path`` may end in "?matching_heuristics=True" for weights with other names."""
        path, self._guess_names = path.removesuffix(_HEURISTICS), path.endswith(_HEURISTICS)
        if path and "://" not in path and not self.path_manager.isfile(path):
            raise CheckpointError(f"{path}: there is no such weights file. Check MODEL.WEIGHTS.")
        try:
            return super().load(path, *args, **kwargs)
        except KNetError:
            raise
        except (KeyError, ValueError) as e:
            raise CheckpointError(f"{path}: does not fit this model or its optimiser. {e}") from e
        finally:
            self._parsed_url_during_load = None  # else Detectron2 refuses to load again after a failure

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        last = self.get_checkpoint_file()
        rest = self.load(last)
        unread = [key for key in self.checkpointables if key in rest]
        if unread:
            raise CheckpointError(f"{last}: {unread} could not be restored.")
        return rest

    def _load_file(self, f: str) -> Dict[str, Any]:
        checkpoint = as_checkpoint(load_file(f), f)
        if self._guess_names:
            checkpoint["matching_heuristics"] = True
        return checkpoint

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        number = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        if len(incompatible.unexpected_keys) + len(incompatible.incorrect_shapes) >= number:
            raise CheckpointError(
                f"None of the {number} parameters in the weights file fits this model; "
                "check MODEL.WEIGHTS against the config (it is a checkpoint of another model)."
            )
        return incompatible
