"""Whether a weights file fits a model, and why not."""

import re

from .layouts import Layout
from .load_report import LoadReport, ShapePair, summarise

# Their first dimension counts classes or instance kernels
_COUNTED = re.compile(r"sem_seg_head\.instance_kernels\.|(^|\.)classifier\.|\.class_branch\.")
# What pretrained backbones lack: offsets of deformable convolutions, Swin's norms of the outputs
_NEW_IN_BACKBONE = re.compile(r"\.conv_offset\.|\.out_norms\.")
_TRAINING_ONLY = "auxiliary_head."
_MOST_NAMES = 4


def find_misfits(report: LoadReport, layout: Layout, partial: bool) -> list[str]:
    """The reasons why a file can't be loaded into a model; none if it fits.

    Args:
        partial: the model is going to be trained, so what depends on the numbers of classes and kernels may start
            anew, and so may everything around a pretrained backbone.
    """
    missing = [name for name in report.missing if not name.startswith(_TRAINING_ONLY)]
    unexpected = [name for name in report.unexpected if not name.startswith(_TRAINING_ONLY)]
    other_shape = list(report.other_shape)
    if layout.scope == "backbone":
        unexpected = [name for name in unexpected if _has_stage_of(name, report, layout)]
        if partial:
            missing = [
                name
                for name in missing
                if name.startswith(layout.backbone_prefix)
                and not _NEW_IN_BACKBONE.search(name)
                and not re.match(r"backbone\.fpn_", name)
            ]
        elif missing:
            return ["it is a pretrained backbone to start a training from, and the rest of the model is not in it"]
    elif layout.scope == "unknown":
        unexpected = []
        if partial:
            missing, other_shape = [], []
    elif partial:
        other_shape = [pair for pair in other_shape if not _differs_in_count(pair)]
    return _describe(missing, unexpected, other_shape)


def _differs_in_count(pair: ShapePair) -> bool:
    return bool(_COUNTED.search(pair.name)) and pair.file_shape[1:] == pair.model_shape[1:]


def _has_stage_of(name: str, report: LoadReport, layout: Layout) -> bool:
    """Whether the model has a part of the stage ("res4", "stages.2") that a name is of; it may end before."""
    if not name.startswith(layout.backbone_prefix):
        return True
    rest = name.removeprefix(layout.backbone_prefix)
    stage = re.match(r"(?:stages\.\d+|\w+)\.", rest)[0]
    return any(loaded.startswith(layout.backbone_prefix + stage) for loaded in report.loaded)


def _describe(missing: list[str], unexpected: list[str], other_shape: list[ShapePair]) -> list[str]:
    reasons = []
    if missing:
        reasons.append(f"{len(missing)} of the model's parameters are not in the file ({_some(missing)})")
    if unexpected:
        reasons.append(f"{len(unexpected)} in the file are not in the model ({_some(unexpected)})")
    if other_shape:
        first = other_shape[0]
        reasons.append(
            f"{len(other_shape)} have another shape ({_some([pair.name for pair in other_shape])}; the first is "
            f"{first.file_shape} in the file, {first.model_shape} in the model)"
        )
    return reasons


def _some(names: list[str]) -> str:
    groups = summarise(names)
    return ", ".join(groups[:_MOST_NAMES]) + (", ..." if len(groups) > _MOST_NAMES else "")
