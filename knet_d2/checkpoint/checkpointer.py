"""Detectron2's checkpointer with atomic writing, safe reading, and errors for files that do not fit the model."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import nn

from ..data.classes import ClassTable
from ..errors import CheckpointError, KNetError
from .address import weights_file
from .class_rows import class_parameters, first_difference, match_rows, take_rows
from .description import changed_options, described_classes, has_description
from .download import download_errors
from .load_report import Layout, LoadReport, adapt_input_layer, build_report, find_misfits, recognise
from .loading import as_checkpoint, load_file, split_options
from .resume import newest_whole_checkpoint, resumable_checkpoints
from .saving import write_checkpoint
from .zoo import fitting_hint

_MOST_LISTED = 20
# Options that change what a model computes, but none of its parameters: a wrong value fits any weights
_WITHOUT_PARAMETERS = (
    "INPUT.FORMAT",
    "MODEL.FPN.FUSE_TYPE",
    "MODEL.KNET.POSITION_ENCODING",
    "MODEL.KNET.UPDATE_HEAD.NUM_HEADS",
    "MODEL.KNET.UPDATE_HEAD.RESIDUAL_MASKS",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.RES4_DILATION",
    "MODEL.RESNETS.RES5_DILATION",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE",
)
_PREFIX_HINT = (
    " If the file's names only lack a prefix of the model's, end its path in MODEL.WEIGHTS with "
    "?matching_heuristics=True."
)


class Checkpointer(DetectionCheckpointer):
    """Saves and loads the model and, in training, the trainer's state; the main process writes.

    It reads our own files, official K-Nets and pretrained backbones, whatever the file is called. Classes of our own
    files are compared with the model's by name. ``report`` says what became of every parameter of the last file, and
    ``file_metadata`` is what the file says about its model.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        partial: bool = False,
        metadata: dict[str, str] | None = None,
        classes: ClassTable | None = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        """
        Args:
            partial: True for the start of a training run: layers that depend on the number of classes or kernels, and
                everything around a pretrained backbone, keep their initialisation where they do not fit. False: each
                parameter must be in the file.
            metadata: written into every file, see :func:`describe_model`.
            classes: the model's classes. If a file has them in another order, its rows are re-ordered by name. If it
                has other classes, a partial load keeps the rows of classes with the same name and re-initialises the
                rest; any other load raises a CheckpointError. None, or a table without names: no comparison.
            save_dir, save_to_disk, checkpointables: see Detectron2's.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.partial = partial
        self.metadata = metadata or {}
        self.classes = classes
        self.report: LoadReport | None = None
        self.file_metadata: Any = None
        self.file_classes: ClassTable | None = None
        self._options: dict[str, str] = {}
        self._restores_training = False

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
        local = weights_file(address)
        if "://" in local:
            with download_errors(address, "get the file by other means and name it in MODEL.WEIGHTS."):
                # Detectron2's main branch would take the address apart and lose an absolute path's slashes in it
                local = self.path_manager.get_local_path(local)
        if not os.path.isfile(local):
            raise CheckpointError(f"{address}: there is no such weights file. Check MODEL.WEIGHTS.")
        try:
            with _misfits_named(path):
                return super().load(local, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # else Detectron2 refuses to load again after a failure

    def load_content(self, content: Any, path: str) -> None:
        """Load the model alone from a file that has been read.

        Args:
            content: result of :func:`load_file`.
            path: the file's name, for messages.
        """
        with _misfits_named(path):
            self._load_model({**as_checkpoint(content, path), "file": path})

    def has_checkpoint(self) -> bool:
        return bool(resumable_checkpoints(self.save_dir))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """See Detectron2's; a damaged last checkpoint is passed over, with a warning, for the one before."""
        last = newest_whole_checkpoint(self.save_dir) if resume else None
        if last is None:
            return self.load(path, checkpointables=[])
        self.partial, self._restores_training = False, bool(self.checkpointables)
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
        self.file_metadata = checkpoint.get("metadata")
        self.file_classes = described_classes(checkpoint, path)
        if self.partial:
            adapt_input_layer(layout, model_state)
        self.report = build_report(layout, state_dict, model_state)
        if not find_misfits(self.report._replace(other_shape=[]), layout, self.partial):  # else it is another model
            layout = self._match_classes(path, layout, model_state)
            self.report = build_report(layout, state_dict, model_state)
        self._check_fit(path, layout)
        checkpoint["model"] = layout.translation.state_dict
        for name in self.report.loaded:
            _check_values(path, name, checkpoint["model"][name], model_state[name].dtype)
        super()._load_model(checkpoint)
        if not self._restores_training:
            self._warn_of_other_options(path)
        self._log_report(path, layout)

    def _log_report(self, path: str, layout: Layout) -> None:
        """Log what became of each parameter: a line if all are loaded, or only what is new behind a backbone is not."""
        report, table = self.report, f"{path}\n{self.report.as_text()}"
        lacking = [*(x.name for x in report.other_shape), *report.missing]
        if layout.scope == "backbone" and not any(name.startswith(layout.backbone_prefix) for name in lacking):
            self.logger.info(f"{path}: {report.in_brief()}")
            self.logger.debug(table)
        elif not (lacking or report.reshaped or report.unexpected or report.ignored):
            self.logger.info(f"{path}: all {len(report.loaded)} parameters are loaded (file: {report.layout}).")
        elif report.other_shape or report.missing_in_evaluation():
            self.logger.warning(table)
        else:
            self.logger.info(table)

    def _warn_of_other_options(self, path: str) -> None:
        """Warn of options without parameters whose values are not those in the file.

        A training run may start from a model with other options, but hardly from one with red and blue exchanged.
        """
        if not self.metadata or not has_description({"metadata": self.file_metadata}):
            return
        try:
            changed = changed_options(self.metadata, self.file_metadata)
        except Exception:  # the config in use needs nothing of the file, whose text may raise almost any exception
            return
        for key, (before, now) in changed.items():
            if key not in _WITHOUT_PARAMETERS or not before and isinstance(before, list):  # []: the file does not tell
                continue
            if not self.partial or sorted([str(before), str(now)]) == ["BGR", "RGB"]:
                self.logger.warning(
                    f"{key} = {now}: {path} was trained with {before}. Set it to {before}, or results get worse."
                )

    def _match_classes(self, path: str, layout: Layout, model_state: dict[str, torch.Tensor]) -> Layout:
        """The layout with its classes in the model's order, see ``classes`` of the constructor."""
        file_classes = self.file_classes
        if self.classes is None or not self.classes.has_names or file_classes is None:
            return layout
        rows = match_rows(self.classes, file_classes)
        if rows == list(range(len(file_classes.names))):
            return layout
        state_dict, translation = layout.translation.state_dict, layout.translation
        wrong = [name for name in class_parameters(state_dict) if len(state_dict[name]) != len(file_classes.names)]
        if wrong:
            raise CheckpointError(
                f"{path}: it names {len(file_classes.names)} classes, but {wrong[0]} has {len(state_dict[wrong[0]])} "
                "rows. Get the file again."
            )
        others = None in rows or len(rows) < len(file_classes.names)
        if others and not self.partial:
            raise CheckpointError(
                f"{path} has other classes than the data set: {first_difference(self.classes, file_classes)}. Name a "
                "data set in the config with the classes that the model was trained on, or fine-tune it on this one "
                "(knet train without --eval-only, with the file as MODEL.WEIGHTS)."
            )
        if self._restores_training:
            raise CheckpointError(
                f"{path}: the run was trained with the classes in another order than the data set has now. Bring the "
                "data set's classes into their former order, or start from the file by MODEL.WEIGHTS without --resume."
            )
        if others:
            new = [name for name, row in zip(self.classes.names, rows, strict=True) if row is None]
            kept = [name for name, row in zip(self.classes.names, rows, strict=True) if row is not None]
            self.logger.warning(
                f"{path} has other classes than the data set. Rows of the classifiers that are kept, by name: "
                f"{_listed(kept)}. Rows that start anew: {_listed(new)}."
            )
        else:
            self.logger.warning(
                f"{path} has the data set's classes in another order. The rows of the classifiers are re-ordered by "
                f"name; the order is now: {_listed(self.classes.names)}."
            )
        return layout._replace(translation=translation._replace(state_dict=take_rows(state_dict, rows, model_state)))

    def _check_fit(self, path: str, layout: Layout) -> None:
        reasons = find_misfits(self.report, layout, self.partial)
        if self.report.loaded and not reasons:
            return
        hint = fitting_hint(layout.translation.state_dict) if layout.scope == "model" else ""
        if self.report.loaded:
            raise CheckpointError(
                f"{path} ({layout.name}) does not fit this config: {'; '.join(reasons)}.{hint}{self._changed_model()}"
            )
        number = len(layout.translation.state_dict) + len(self.report.ignored) + len(layout.translation.unknown)
        raise CheckpointError(
            f"{path}: none of the {number} parameters in the weights file fits this model; "
            f"check MODEL.WEIGHTS against the config (it is a checkpoint of another model).{hint or _PREFIX_HINT}"
        )

    def _changed_model(self) -> str:
        """Return a sentence on the model's options that differ from those of the resumed run; "" if there are none."""
        if not self._restores_training or not has_description({"metadata": self.file_metadata}):
            return ""
        changed = changed_options(self.metadata, self.file_metadata)
        texts = [f"{key} {before} -> {now}" for key, (before, now) in changed.items() if key.startswith("MODEL.")]
        return f" Options that differ from those of the run so far: {', '.join(texts)}. Set them back." if texts else ""


@contextlib.contextmanager
def _misfits_named(path: str) -> Iterator[None]:
    """Turn what PyTorch raises about a file that does not fit into a CheckpointError."""
    try:
        yield
    except KNetError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as e:
        raise CheckpointError(f"{path}: does not fit this model or its optimiser. {e}") from e


def _listed(names: Sequence[str]) -> str:
    """Join names for a message; of many, only the first ones."""
    shown = [" ".join(name.split())[:60] for name in names[:_MOST_LISTED]]
    rest = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + rest or "none"


def _check_values(path: str, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise a CheckpointError if a parameter is not finite, or changes its value in the model's type."""
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
