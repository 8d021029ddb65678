"""Compares inference with the recordings: every tensor from the backbone to the final masks."""

import re
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances

from knet_d2.modeling import postprocessing

from .cases import Result, not_compared, relative_difference, share_of_different

TOLERANCE = 1e-4  # relative to the largest recorded value
NOISE_FACTOR = 10  # the tolerance is at least this multiple of the recorded rounding noise of float32
LABEL_MAP_TOLERANCE = 1e-3  # share of pixels
SAME_SCORE = 1e-5  # results whose scores differ by less may be in another order
NEAR_THRESHOLD = 1e-4  # mask pixels whose probability is this close to the threshold may differ
VOID = 133  # value of void pixels in the official panoptic maps
INDEX_STEP = 1000  # values of the official panoptic maps are class + 1000 * index of the segment


def _outputs_of(model: torch.nn.Module, names: dict[str, str], stack: ExitStack) -> dict[str, Any]:
    """Return a dict that gets the outputs of modules while they run; ``names`` is {key of the dict: module name}."""
    outputs = {}
    for key, name in names.items():
        hook = model.get_submodule(name).register_forward_hook(lambda m, i, o, key=key: outputs.__setitem__(key, o))
        stack.callback(hook.remove)
    return outputs


def run_inference(model: torch.nn.Module, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return all tensors of one image, by the names in the recordings; "result" is the result of the model."""
    height, width = arrays["info"]["img_meta"]["ori_shape"][:2]
    image = torch.from_numpy(arrays["image"]).permute(2, 0, 1)
    detection = model.bank.num_matched > 0
    modules = {"backbone": "backbone.bottom_up" if detection else "backbone"}
    modules.update(state="sem_seg_head", stages="cascade")
    if detection:
        head = "sem_seg_head."
        modules.update(neck="backbone", semantic_fpn0=head + "localization_branch.0")
        modules.update(semantic_fpn1=head + "semantic_branch.0")
        modules.update(loc_feats=head + "localization_branch", seg_feats=head + "semantic_branch")
    with ExitStack() as stack:
        outputs = _outputs_of(model, modules, stack)
        with torch.no_grad():
            outputs["result"] = model.eval()([{"image": image, "height": height, "width": width}])[0]
            tensors = _detection_tensors(model, outputs) if detection else _semantic_tensors(outputs)
            if detection:
                tensors["boundary"] = _boundary_differences(model, outputs)
                padded = [4 * side for side in outputs["neck"]["p2"].shape[-2:]]
                geometry = postprocessing.ImageGeometry(tuple(padded), tuple(image.shape[1:]), (height, width))
                tensors["probabilities"] = postprocessing.mask_probabilities(
                    outputs["stages"][-1].mask_logits[0], geometry
                )
    for prefix in ("backbone", "neck"):
        for i, value in enumerate(outputs.get(prefix, {}).values()):
            tensors[f"{prefix}{i}"] = value
    return _on_cpu({**tensors, "class_mask": model.postprocessor.class_mask, "result": outputs["result"]})


def _on_cpu(value: Any) -> Any:
    """Copy all tensors of a nested value to the CPU, where they are compared."""
    if isinstance(value, (torch.Tensor, Instances)):
        return value.to("cpu")
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, (list, tuple)) else value


def _detection_tensors(model, outputs) -> dict[str, torch.Tensor]:
    state = outputs["state"]
    tensors = {key: outputs[key] for key in ("semantic_fpn0", "semantic_fpn1", "loc_feats", "seg_feats")}
    tensors.update(x_feats=state.feature, mask_preds=state.mask_logits, seg_preds=state.semantic_logits)
    tensors["proposal_feats"] = state.kernels[..., None, None]
    for i, stage in enumerate(outputs["stages"]):
        tensors[f"s{i}_cls_score"] = stage.class_logits
        tensors[f"s{i}_mask_preds"] = stage.mask_logits
        tensors[f"s{i}_object_feats"] = stage.kernels[..., None, None]
    return tensors


def _boundary_differences(model, outputs) -> dict[str, float]:
    """Check that pixels with a logit of exactly 0 belong to no mask, of the static kernels and of a stage.

    The recordings do not contain such logits. All returned differences must be 0.
    """
    weight, state, stage = model.sem_seg_head.instance_kernels.weight, outputs["state"], model.cascade.stages[0]
    kept = weight.clone()
    weight.zero_()
    static_kernels = model.sem_seg_head(outputs["neck"]).kernels[:, : model.bank.num_matched]
    weight.copy_(kept)
    zeros = torch.zeros_like(state.mask_logits)
    at, below = (stage(state.feature, state.kernels, logits).kernels for logits in (zeros, zeros - 1))
    return {
        "static": float(static_kernels.abs().max()),
        "stage": float((at - below).abs().max()),
    }


def _semantic_tensors(outputs) -> dict[str, torch.Tensor]:
    state, final = outputs["state"], outputs["result"]["sem_seg"]
    tensors = {"gen_feats": state.feature, "gen_logits": state.mask_logits}
    tensors["gen_kernels"] = state.kernels[..., None, None]
    for i, stage in enumerate(outputs["stages"]):
        tensors[f"s{i}_logits"] = stage.mask_logits
        tensors[f"s{i}_kernels"] = stage.kernels[..., None, None]
    tensors.update(final_logits=final[None], final_prob=final.softmax(dim=0)[None])
    return tensors


def check_inference(model: torch.nn.Module, case: str, arrays: dict[str, Any]) -> list[Result]:
    """Compare all entries of a recorded inference with ours."""
    tensors, boundary = run_inference(model, arrays), []
    finals = {"instance": _check_instances, "panoptic": _check_panoptic, "semantic": _check_semantic}
    for name, difference in tensors.get("boundary", {}).items():
        boundary.append(Result(case, f"boundary: {name}", difference, 0.0))
    task = "instance" if "masks_packed" in arrays else "panoptic" if "pan_results" in arrays else "semantic"
    checked = boundary + finals[task](case, arrays, tensors)
    return checked + [_check_tensor(case, name, arrays, tensors) for name in not_compared(arrays, checked)]


def _check_tensor(case: str, name: str, arrays, tensors) -> Result:
    """Compare one recorded tensor: whole, its first channels ("_slice"), every n-th channel, or its "_stats"."""
    base, part = re.fullmatch(r"(.*?)(_stats|_slice|_every\d+|_sub8)?", name).groups()
    recorded, ours = arrays[name], tensors[base]
    noise = arrays["info"].get("noise_f32_vs_f64", {}).get(base, {}).get("abs", 0.0)
    statistics = arrays.get(f"{base}_stats")
    scale = np.abs(recorded if statistics is None else statistics[2:]).max()
    tolerance = max(TOLERANCE, NOISE_FACTOR * noise / scale)
    return Result(case, name, relative_difference(_part(ours, part, recorded, arrays), recorded, scale), tolerance)


def _part(tensor: torch.Tensor, part: str, recorded: np.ndarray, arrays) -> torch.Tensor:
    tensor = tensor.double()
    if part == "_stats":
        return torch.stack([tensor.mean(), tensor.std(), tensor.min(), tensor.max()])
    if part == "_sub8":
        return tensor[..., ::8, ::8]
    step = int(arrays.get("spatial_step", 1))
    if tensor.shape[-2:] != recorded.shape[-2:]:
        tensor = tensor[..., ::step, ::step]
    if part == "_slice":
        return tensor[:, : recorded.shape[1]]
    return tensor[:, :: int(part[len("_every") :])] if part else tensor


def _soft_masks(case: str, probabilities: torch.Tensor, arrays) -> list[Result]:
    ours = {"soft_masks_sub": probabilities[:, ::8, ::8], "soft_masks_area": probabilities.mean((1, 2))}
    return [Result(case, name, relative_difference(value, arrays[name]), TOLERANCE) for name, value in ours.items()]


def _check_instances(case: str, arrays, tensors) -> list[Result]:
    instances = tensors["result"]["instances"]
    count, height, width = (int(n) for n in arrays["masks_shape"])
    scores, labels = instances.scores.numpy(), instances.pred_classes.numpy()
    if len(scores) != count:
        return [Result(case, name, float("inf"), 0.0) for name in ("scores", "labels", "masks_packed")]
    results = [Result(case, "scores", relative_difference(scores, arrays["scores"]), TOLERANCE)]

    # Sort results with equal scores by label, in both lists.
    ties = np.concatenate([[0], np.cumsum(-np.diff(arrays["scores"]) >= SAME_SCORE)])
    order = np.lexsort((labels, ties))
    recorded_order = np.lexsort((arrays["labels"], ties))
    wrong_labels = share_of_different(labels[order], arrays["labels"][recorded_order])
    results.append(Result(case, "labels", wrong_labels, 0.0))

    num_classes = tensors["s2_cls_score"].shape[2]
    pairs = tensors["s2_cls_score"].flatten().topk(count).indices
    probabilities = tensors["probabilities"][pairs // num_classes]
    recorded = np.unpackbits(arrays["masks_packed"], axis=1)[:, : height * width].reshape(count, height, width)
    masks = instances.pred_masks.numpy()
    if masks.shape != recorded.shape:
        return [*results, Result(case, "masks_packed", float("inf"), 0.0)]
    near = (probabilities[order].double() - postprocessing.rules.MASK_THRESHOLD).abs().numpy() < NEAR_THRESHOLD
    wrong = (masks[order] != recorded[recorded_order]) & ~near
    results.append(Result(case, "masks_packed", float(wrong.mean()), 0.0))
    inverse = order[np.argsort(recorded_order)]
    return results + _soft_masks(case, probabilities[torch.from_numpy(inverse)], arrays)


def _check_panoptic(case: str, arrays, tensors) -> list[Result]:
    segment_map, segments = tensors["result"]["panoptic_seg"]
    ours = np.full(segment_map.shape, VOID)
    for i, segment in enumerate(segments):
        ours[segment_map.numpy() == segment["id"]] = segment["category_id"] + INDEX_STEP * i
    recorded = arrays["pan_results"]
    segments_differ = set(np.unique(ours)) != set(np.unique(recorded))
    scores, labels = tensors["s2_cls_score"][0].sigmoid().masked_fill(~tensors["class_mask"], -1).max(dim=1)
    return [
        Result(case, "pan_results", share_of_different(ours, recorded), LABEL_MAP_TOLERANCE),
        Result(case, "pan_results: segments", float(segments_differ), 0.0),
        Result(case, "total_scores", relative_difference(scores, arrays["total_scores"]), TOLERANCE),
        Result(case, "total_labels", share_of_different(labels.numpy(), arrays["total_labels"]), 0.0),
        *_soft_masks(case, tensors["probabilities"], arrays),
    ]


def _check_semantic(case: str, arrays, tensors) -> list[Result]:
    probabilities = tensors["final_prob"][0]
    best = probabilities.topk(2, dim=0)
    wrong = share_of_different(best.indices[0].numpy(), arrays["argmax"])
    results = [Result(case, "argmax", wrong, LABEL_MAP_TOLERANCE)]
    if "prob_margin" in arrays:  # the recordings in the repository do not have it
        # It was recorded in float16, whose rounding error is up to 2^-11.
        margin = relative_difference(best.values[0] - best.values[1], arrays["prob_margin"])
        results.append(Result(case, "prob_margin", margin, TOLERANCE + 2**-11))
    return results
