"""Detectron2's checkpointer with atomic writing, safe reading and errors instead of warnings where nothing fits."""

import os
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import nn

from ..errors import CheckpointError, KNetError
from .download import download_errors
from .load_report import Layout, LoadReport, build_report, find_misfits, recognise
from .loading import as_checkpoint, load_file, split_options
from .resume import newest_whole_checkpoint, resumable_checkpoints
from .saving import write_checkpoint
from .zoo import fitting_hint


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
            partial: True for the start of a training run: layers that depend on the number of classes or kernels, and
                everything around a pretrained backbone, keep their initialisation where they do not fit. False: each
                parameter must be in the file.
            metadata: written into every file, see :func:`describe_model`.
            save_dir, save_to_disk, checkpointables: see Detectron2's.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.partial = partial
        self.metadata = metadata or {}
        self.report: LoadReport | None = None
        self._options: dict[str, str] = {}

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
        write_checkpoint(path, lambda f: torch.save(data, f))
        if tag:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_checkpoint(path, lambda f: f.write(last_filename_basename.encode()))

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See Detectron2's; ``path`` may end in options, see :func:`split_options`."""
        if not path:
            return super().load(path, *args, **kwargs)
        address, self._options = split_options(path)
        local = address
        if "://" in address:
            with download_errors(address, "get the file by other means and name it in MODEL.WEIGHTS."):
                # Detectron2's main branch would take the address apart and lose an absolute path's slashes in it
                local = self.path_manager.get_local_path(address)
        if not os.path.isfile(local):
            raise CheckpointError(f"{address}: there is no such weights file. Check MODEL.WEIGHTS.")
        try:
            return super().load(local, *args, **kwargs)
        except KNetError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as e:
            raise CheckpointError(f"{path}: does not fit this model or its optimiser. {e}") from e
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
        checkpoint = as_checkpoint(load_file(f, self._options.get("sha256")), f)
        checkpoint["file"] = f
        if "matching_heuristics" in self._options:
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
        for name in self.report.loaded:
            _check_values(path, name, checkpoint["model"][name], model_state[name].dtype)
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


def _check_values(path: str, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise a CheckpointError where a parameter would not be numbers, or not those of the file, in the model."""
    ours = value.to(dtype)
    if dtype.is_floating_point:
        fault = "" if torch.isfinite(ours).all() else "has NaN or infinite values"
    else:
        fault = "" if torch.equal(ours.to(value.dtype), value) else f"has values that are no {dtype}"
    if name.endswith(".running_var") and (ours < 0).any():
        fault = "has negative values"
    if fault:
        raise CheckpointError(
            f"{path}: {name} {fault}. Take another checkpoint: the run that wrote it diverged, or the file is damaged."
        )
