"""The layout of a weights file, a report on every parameter of the file and the model, and the reasons of a misfit."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from tabulate import tabulate

from .key_table import KeyRule, Translation, translate_state_dict
from .openmmlab import openmmlab_rules
from .openmmlab_backbones import pretrained_backbone_rules
from .timm_layouts import efficientnet_lite_rules, timm_rules

Shape = tuple[int, ...]

_OFFICIAL_HEADS = ("rpn_head.localization_fpn.", "decode_head.kernel_generate_head.")
_OUR_HEADS = ("sem_seg_head.", "cascade.")

# Parameters whose first dimension is the number of classes or of instance kernels
_COUNTED = re.compile(r"sem_seg_head\.instance_kernels\.|training_kernels\.|(^|\.)classifier\.|\.class_branch\.")
# Parameters that pretrained backbones lack: offsets of deformable convolutions, Swin's norms of the outputs
_NEW_IN_BACKBONE = re.compile(r"\.conv_offset\.|\.out_norms\.")
_TRAINING_ONLY = ("auxiliary_head.", "training_kernels.")
# What a video model learns beside an image model
_VIDEO = "video."
_MOST_NAMES = 4


class Layout(NamedTuple):
    """A state dict whose layout is recognised.

    Attributes:
        name: of the layout, for messages.
        scope: the part of the model in the file: "model" (a whole K-Net), "backbone" (pretrained), or "unknown".
        translation: the state dict with our names.
        backbone_prefix: prefix of our names in the backbone; with an FPN, in the network below it.
    """

    name: str
    scope: str
    translation: Translation
    backbone_prefix: str


def recognise(state_dict: Mapping[str, torch.Tensor], model_keys: Collection[str]) -> Layout:
    """Detect the layout of a state dict by its names, and translate the names to ours.

    Args:
        state_dict: name -> tensor.
        model_keys: names in the model's state dict.
    """
    has_fpn = any(key.startswith("backbone.bottom_up.") for key in model_keys)
    prefix = "backbone.bottom_up." if has_fpn else "backbone."
    is_timm = any(key.startswith(f"{prefix}network.") for key in model_keys)
    if is_timm:
        prefix += "network."

    def layout(name: str, scope: str, rules: list[KeyRule]) -> Layout:
        return Layout(name, scope, translate_state_dict(state_dict, rules, model_keys), prefix)

    if any(key.startswith(_OFFICIAL_HEADS) for key in state_dict):
        return layout("official K-Net (OpenMMLab)", "model", openmmlab_rules(state_dict))
    if is_timm and "_conv_stem.weight" in state_dict:
        return layout(
            "EfficientNet-Lite of the package registry", "backbone", efficientnet_lite_rules(state_dict, prefix)
        )
    if is_timm and any(prefix + key in model_keys for key in state_dict):
        return layout("network of timm", "backbone", timm_rules(prefix))
    if "res2.0.conv1.weight" in state_dict:
        return layout("backbone of Detectron2", "backbone", _detectron2_backbone_rules(prefix))
    pretrained = pretrained_backbone_rules(state_dict, prefix)
    if pretrained is not None:
        name, rules = pretrained
        return layout(name, "backbone", rules)
    unchanged = Translation(dict(state_dict), {key: key for key in state_dict}, [], [])
    is_whole = any(key.startswith(_OUR_HEADS) for key in state_dict)
    return Layout("names of this project", "model" if is_whole else "unknown", unchanged, prefix)


def _detectron2_backbone_rules(prefix: str) -> list[KeyRule]:
    """Detectron2's names, which are ours without the prefix; some of its files also have the classifier."""
    return [
        KeyRule(r"stem\.fc\.(weight|bias)", None),
        KeyRule(r"(?:stem|res[2-5])\..*num_batches_tracked", lambda m: prefix + m[0], optional=True),
        KeyRule(r"(?:stem|res[2-5])\..*", lambda m: prefix + m[0]),
    ]


class ShapePair(NamedTuple):
    """A parameter whose shape in the file is not that in the model."""

    name: str
    file_shape: Shape
    model_shape: Shape


class LoadReport(NamedTuple):
    """What became of each parameter of a file and of a model.

    Each name is in exactly one of the lists, but those in ``reshaped`` are also in ``loaded``.

    Attributes:
        layout: name of the layout.
        loaded: our names of the loaded parameters.
        reshaped: loaded parameters that the file stores in another shape.
        other_shape: not loaded, for example because the number of classes differs; they keep their initialisation.
        missing: in the model only; they keep their initialisation. The counters of batch norms are left out.
        unexpected: in the file only; with the file's name where we have none.
        ignored: in the file only, and known not to be needed (a classifier of ImageNet, counters of batch norms).
    """

    layout: str
    loaded: list[str]
    reshaped: list[ShapePair]
    other_shape: list[ShapePair]
    missing: list[str]
    unexpected: list[str]
    ignored: list[str]

    def missing_in_evaluation(self) -> list[str]:
        """The missing parameters that an evaluated model needs."""
        return [name for name in self.missing if not name.startswith(_TRAINING_ONLY)]

    def in_brief(self) -> str:
        """A sentence on the start from a pretrained backbone, in which the rest of the model is new."""
        parts = Counter(name.split(".")[0] for name in self.missing)
        new = ", ".join(f"{part} ({count})" for part, count in parts.items())
        return f"{len(self.loaded)} parameters of a backbone are loaded. The rest learns from random ones: {new}."

    def as_text(self) -> str:
        """Return a table with one row for each list; names that differ only in numbers are merged."""
        rows = [
            ["loaded", len(self.loaded), ""],
            ["... in another shape", len(self.reshaped), _pairs(self.reshaped)],
            ["re-initialised: another shape", len(self.other_shape), _pairs(self.other_shape)],
            ["re-initialised: not in the file", len(self.missing), "\n".join(summarise(self.missing))],
            ["not used: not in the model", len(self.unexpected), "\n".join(summarise(self.unexpected))],
            ["not used: not needed", len(self.ignored), "\n".join(summarise(self.ignored))],
        ]
        rows = [row for row in rows if row[1] or row[0] == "loaded"]
        return tabulate(rows, headers=["parameters", "number", f"names (file: {self.layout})"], tablefmt="simple")


def build_report(
    layout: Layout, state_dict: Mapping[str, torch.Tensor], model_state: Mapping[str, torch.Tensor]
) -> LoadReport:
    """Compare a file with a model, by names and shapes.

    Args:
        layout: the file's state dict in our names.
        state_dict: the same in its own names.
        model_state: the model's state dict.
    """
    report = LoadReport(layout.name, [], [], [], [], list(layout.translation.unknown), list(layout.translation.ignored))
    for name, value in layout.translation.state_dict.items():
        source = layout.translation.source_keys[name]
        shape = tuple(value.shape)
        if name not in model_state:
            report.unexpected.append(name)
            continue
        model_shape = tuple(model_state[name].shape)
        if shape != model_shape:
            report.other_shape.append(ShapePair(name, shape, model_shape))
            continue
        report.loaded.append(name)
        if tuple(state_dict[source].shape) != shape:
            report.reshaped.append(ShapePair(name, tuple(state_dict[source].shape), shape))
    translated = layout.translation.state_dict
    report.missing.extend(name for name in model_state if name not in translated and not is_counter(name))
    return report


def adapt_input_layer(layout: Layout, model_state: Mapping[str, torch.Tensor]) -> None:
    """Fit the backbone's first convolution to the model's number of input channels (in place), as timm does.

    From c to n channels: n = 1 takes the sum over the channels, so that a grey image gives what it gave in c equal
    channels; others repeat the c channels up to n and scale by c / n.
    """
    layers = (key for key, x in model_state.items() if key.startswith(layout.backbone_prefix) and x.dim() == 4)
    name = next(layers, "")
    state_dict = layout.translation.state_dict
    if name not in state_dict or state_dict[name].dim() != 4:
        return
    weight, channels = state_dict[name], model_state[name].shape[1]
    count = weight.shape[1]
    if count == channels or not count:
        return
    if channels == 1:
        state_dict[name] = weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    else:
        state_dict[name] = weight.repeat(1, -(-channels // count), 1, 1)[:, :channels] * (count / channels)


def find_misfits(report: LoadReport, layout: Layout, partial: bool) -> list[str]:
    """Return the reasons why a file can't be loaded into a model; none if it fits.

    Args:
        report: the file compared with the model.
        layout: of the file.
        partial: whether the model is going to be trained. Then parameters whose shape depends on the number of classes
            or kernels may keep their initialisation, and so may everything outside of a pretrained backbone.
    """
    missing = report.missing_in_evaluation()
    unexpected = [name for name in report.unexpected if not name.startswith(_TRAINING_ONLY)]
    other_shape = list(report.other_shape)
    if layout.scope == "backbone":
        # The model may use only the first stages of the file. None: names that belong to no stage.
        stages = {None, *(_stage(name, layout) for name in report.loaded)}
        unexpected = [name for name in unexpected if _stage(name, layout) in stages]
        if partial:
            missing = [
                name
                for name in missing
                if name.startswith(layout.backbone_prefix)
                and not _NEW_IN_BACKBONE.search(name)
                and not re.match(r"backbone\.fpn_", name)
            ]
        elif missing:
            return ["it is a pretrained backbone to start a training run from, and the rest of the model is not in it"]
    elif layout.scope == "unknown":  # the checkpointer raises an error if nothing is loaded
        unexpected = []
        if partial:
            missing, other_shape = [], []
    elif partial:
        missing = [name for name in missing if not name.startswith(_VIDEO)]
        other_shape = [pair for pair in other_shape if not _differs_in_count(pair)]
    return _describe(missing, unexpected, other_shape)


def _differs_in_count(pair: ShapePair) -> bool:
    return bool(_COUNTED.search(pair.name)) and pair.file_shape[1:] == pair.model_shape[1:]


def _stage(name: str, layout: Layout) -> str | None:
    """Return a backbone parameter's name up to its stage ("res4", "stages.2"); None outside of the backbone."""
    match = re.match(re.escape(layout.backbone_prefix) + r"(?:(?:stages|blocks|layers)\.\d+|\w+)\.", name)
    return match[0] if match else None


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


def is_counter(name: str) -> bool:
    """Whether a name is that of a batch norm's counter of batches, which no computation here reads."""
    return name.endswith(".num_batches_tracked")


def summarise(names: Iterable[str]) -> list[str]:
    """Merge names that differ only in numbers or in the last part, as "res{2,3}.0.conv1.{weight,bias}"."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(re.sub(r"\d+", "#", part) for part in name.split(".")[:-1]), []).append(name)
    merged = []
    for group in groups.values():
        parts = zip(*(name.split(".") for name in group))
        merged.append(".".join(map(_alternatives, parts)) + (f" ({len(group)})" if len(group) > 1 else ""))
    return merged


def _alternatives(parts: Sequence[str]) -> str:
    different = list(dict.fromkeys(parts))
    if len(different) == 1:
        return different[0]
    stem = re.match(r"\D*", different[0])[0]
    endings = [part.removeprefix(stem) for part in different]
    if all(ending.isdigit() for ending in endings):
        numbers = sorted(map(int, endings))
        if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
            return f"{stem}{{{numbers[0]}-{numbers[-1]}}}"
        return f"{stem}{{{','.join(map(str, numbers))}}}"
    return f"{{{','.join(different)}}}"


def _pairs(pairs: Sequence[ShapePair]) -> str:
    by_shapes: dict[tuple[Shape, Shape], list[str]] = {}
    for pair in pairs:
        by_shapes.setdefault((pair.file_shape, pair.model_shape), []).append(pair.name)
    lines = []
    for (file_shape, model_shape), names in by_shapes.items():
        lines += [f"{name}: {file_shape} in the file, {model_shape} here" for name in summarise(names)]
    return "\n".join(lines)
