"""Compares training with the recordings: losses, targets, costs, assignments and gradients of a batch of two images."""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances

from knet_d2.checkpoint.key_table import find_rule, translate_key
from knet_d2.checkpoint.openmmlab import openmmlab_rules
from knet_d2.modeling import criterion as criterion_module
from knet_d2.modeling import meta_arch
from knet_d2.modeling.loss_batches import MatchedBatch
from knet_d2.modeling.matcher import HungarianMatcher
from knet_d2.modeling.targets import UNOWNED as OWN_UNOWNED

from .cases import Result, relative_difference, share_of_different

# Relative tolerances of the losses and of the gradient norms, by precision. The rounding noise of a gradient norm in
# float32 depends on the processor: for the instance model it is 1e-6 in the recording and 6e-5 on another processor.
# Changing the image by half a rounding step changes the norms by up to 2e-4. The tolerance is twice this value, or ten
# times the noise of the recordings (panoptic 7e-5, semantic 2e-3). The comparison in float64 is not affected by this
# noise, and is the strict one.
LOSS_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-5}
NORM_TOLERANCES = {torch.float64: {"instance": 1e-5, "panoptic": 1e-5, "semantic": 1e-5}}
NORM_TOLERANCES[torch.float32] = {"instance": 4e-4, "panoptic": 7e-4, "semantic": 2e-2}
# Tolerances of the first entries of the gradients: ours are float64, but they were recorded only in float32.
GRADIENT_TOLERANCES = {"instance": 3e-4, "panoptic": 1e-2, "semantic": 3e-2}
COST_TOLERANCE = 1e-4
TARGET_TOLERANCE = 1e-6
UNOWNED = 255  # ignore index of the official rank targets


def make_batch(arrays: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """Return the recorded images and ground truth as a batch for the model."""
    batch = []
    for i in range(2):
        x = {"image": torch.from_numpy(arrays[f"image{i}"]).permute(2, 0, 1)}
        size = tuple(x["image"].shape[1:])
        if task == "semantic":
            x["sem_seg"] = torch.from_numpy(arrays["gt_semantic_seg"][i]).long()
        else:
            masks = torch.from_numpy(arrays[f"gt_masks{i}"]).bool().reshape(-1, *size)
            classes = torch.from_numpy(arrays[f"gt_labels{i}"]).long()
            x["instances"] = Instances(size, gt_classes=classes, gt_masks=BitMasks(masks))
            x["sem_seg"] = torch.from_numpy(arrays[f"gt_sem{i}"]).long()
        batch.append(x)
    return batch


def _record_calls(stack: ExitStack, owner: Any, name: str) -> list[Any]:
    """Return a list that gets (arguments, result) of every call of ``owner.name``."""
    calls, function = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append((args, result))
        return result

    stack.enter_context(mock.patch.object(owner, name, wrapper))
    return calls


def _recorded_loss_name(name: str) -> str:
    """Return the official name for our name of a loss."""
    if name == "loss_auxiliary":
        return "aux.loss_ce"
    term, stage = name[len("loss_") :].rsplit("_s", 1)
    term = {"class": "cls", "dense": "seg"}.get(term, term)
    return f"loss_rpn_{term}" if stage == "0" else f"s{int(stage) - 1}_loss_{term}"


def _official_losses(losses: dict[str, torch.Tensor], task: str, arrays) -> dict[str, torch.Tensor]:
    if task == "semantic":
        names = {name: f"decode.loss_ce.s{name[-1]}" for name in losses if name != "loss_auxiliary"}
        names["loss_auxiliary"] = "aux.loss_ce"
    else:
        names = {name: _recorded_loss_name(name) for name in losses}
    official = {names[name]: value for name, value in losses.items()}
    official["loss"] = sum(losses.values())
    if "loss/loss_rank" in arrays:  # the official name if a batch has no ground truth
        official["loss_rank"] = official.pop("loss_rpn_rank")
    return official


def check_training(
    model: torch.nn.Module, case: str, arrays: dict[str, Any], dtype: torch.dtype = torch.float64
) -> list[Result]:
    """Compare all entries of a recorded training step with ours, in one precision."""
    task = "semantic" if "gt_semantic_seg" in arrays else "panoptic" if "loss/s0_loss_rank" in arrays else "instance"
    model = model.to(dtype).train()
    model.zero_grad()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    checked = _check_running_statistics(model, case, arrays)
    with ExitStack() as stack:
        calls = {name: _record_calls(stack, criterion_module, name) for name in ("dense_labels", "rank_targets")}
        calls["positives"] = _record_calls(stack, MatchedBatch, "_build_positives")
        calls["match"] = _record_calls(stack, HungarianMatcher, "match")
        calls["cross_entropy"] = _record_calls(stack, criterion_module, "kernel_cross_entropy")
        calls["criterion"] = _record_calls(stack, criterion_module.KNetCriterion, "forward")
        if dtype == torch.float32:
            # The rounding of convolutions by oneDNN or with channels_last depends on the processor, and is up to 70
            # times the recorded noise. Therefore both are off in float32; the comparison in float64 uses them.
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(mock.patch.object(meta_arch, "channels_last", lambda images: images))
        losses = model(make_batch(arrays, task))
        sum(losses.values()).backward()
    for name, buffer in buffers.items():
        model.get_buffer(name).copy_(buffer)  # restore the running statistics of batch norm

    prefix, official = ("loss64/" if dtype == torch.float64 else "loss/"), _official_losses(losses, task, arrays)
    recorded_losses = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    accuracies = _accuracies(calls, task)
    for name, recorded in recorded_losses.items():
        ours = accuracies[name] if "acc" in name else official[name].detach()
        checked.append(Result(case, prefix + name, relative_difference(ours, recorded), LOSS_TOLERANCES[dtype]))
    unrecorded = [name for name in official if name not in recorded_losses and float(official[name]) != 0]
    checked.append(Result(case, prefix + "names", float(len(unrecorded)), 0.0))
    if task != "semantic":
        checked += _check_targets(model, case, arrays, calls)
    checked += _check_gradients(model, case, arrays, dtype, task)
    precision = str(dtype).removeprefix("torch.")
    return [result._replace(name=f"{precision} {result.name}") for result in checked]


def _percentage(correct: torch.Tensor) -> float:
    return 100 * float(correct.double().mean()) if correct.numel() else 0.0


def _accuracies(calls, task: str) -> dict[str, float]:
    """Return the accuracies that the official code reports: percentages of right pixels or positive kernels."""
    if task == "semantic":
        accuracies = []
        for (logits, labels, *_), _ in calls["cross_entropy"]:
            logits = F.interpolate(logits.detach(), labels.shape[-2:], mode="bilinear", align_corners=False)
            accuracies.append(_percentage(logits.argmax(dim=1) == labels))
        *stages, auxiliary = accuracies
        return {"aux.acc_seg": auxiliary, **{f"decode.acc_seg.s{i}": value for i, value in enumerate(stages)}}
    stages = calls["criterion"][0][0][2]
    positives = [result for _, result in calls["positives"][1:]]
    return {
        f"s{i}_pos_acc": _percentage(stage.class_logits[p.image_index, p.kernel_index].argmax(dim=-1) == p.classes)
        for i, (stage, p) in enumerate(zip(stages, positives))
    }


def _check_running_statistics(model, case: str, arrays) -> list[Result]:
    """Compare the statistics of batch norm before the step, because the recorded step did not change them."""
    results = []
    for name in (name for name in arrays if name.startswith("after_step/")):
        ours = _ours(model, name.split("/", 1)[1], buffers=True)
        results.append(Result(case, name, relative_difference(ours, arrays[name]), TARGET_TOLERANCE))
    return results


def _ours(model: torch.nn.Module, official_name: str, buffers: bool = False) -> torch.Tensor:
    """Return our parameter or buffer for an official name."""
    detection = {"neck.": None} if model.bank.num_matched else {}
    name = translate_key(official_name, find_rule(official_name, openmmlab_rules(detection)))
    return model.get_buffer(name) if buffers else model.get_parameter(name)


def _check_targets(model, case: str, arrays, calls) -> list[Result]:
    results = []
    ((matcher, stages, classes, masks), matches) = calls["match"][0]
    names = ("rpn", "s0", "s1", "s2")
    # Stage 1 (s0) is matched on the predictions of the static kernels, so both have the same match.
    for name, stage in zip(names, (0, 0, 1, 2)):
        for image in range(2):
            kernels, instances = matches[stage][image]
            key = f"match/{name}/img{image}"
            ours = kernels[instances.argsort()].cpu().numpy()
            results.append(Result(case, key, share_of_different(ours, arrays[key]), 0.0))
            key = f"cost/{name}/img{image}"
            if key in arrays:
                cost = sum(matcher.cost_terms(stages[stage][image], classes[image], masks[image]).values())
                results.append(Result(case, key, relative_difference(cost, arrays[key]), COST_TOLERANCE))

    labels = torch.stack([result for _, result in calls["dense_labels"]])
    results.append(Result(case, "rpn_seg_targets", share_of_different(labels, arrays["rpn_seg_targets"]), 0.0))
    rank_targets = [result for _, result in calls["rank_targets"]]
    for name, ours in zip(names, rank_targets):
        key = f"target/{name}_rank_target"
        if key in arrays:
            ours = ours.masked_fill(ours == OWN_UNOWNED, UNOWNED)
            results.append(Result(case, key, share_of_different(ours, arrays[key]), 0.0))
    for name, (_, positives) in zip(names[1:], calls["positives"][1:]):
        results += _check_kernel_targets(model, case, arrays, f"target/{name}_", positives)
    return results


def _check_kernel_targets(model, case: str, arrays, prefix: str, positives) -> list[Result]:
    """Class, class weights and mask area of every kernel of the batch."""
    bank, batch_size = model.bank, 2
    index = (positives.image_index * bank.num_kernels + positives.kernel_index).cpu()
    labels = torch.full((batch_size * bank.num_kernels,), bank.num_classes)
    labels[index] = positives.classes.cpu()
    areas = torch.zeros(len(labels), dtype=positives.target_masks.dtype)
    areas[index] = positives.target_masks.sum(dim=(1, 2)).cpu()
    weights = model.postprocessor.class_mask.repeat(batch_size, 1)
    return [
        Result(case, prefix + "labels", share_of_different(labels, arrays[prefix + "labels"]), 0.0),
        Result(case, prefix + "label_weights", share_of_different(weights, arrays[prefix + "label_weights"]), 0.0),
        Result(
            case,
            prefix + "mask_targets_sum",
            relative_difference(areas, arrays[prefix + "mask_targets_sum"]),
            TARGET_TOLERANCE,
        ),
    ]


def _check_gradients(model, case: str, arrays, dtype: torch.dtype, task: str) -> list[Result]:
    tolerance = NORM_TOLERANCES[dtype][task]
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    missing = sum(p.requires_grad and p.grad is None for p in model.parameters())
    results = [Result(case, "num_params_without_grad", float(missing != int(arrays["num_params_without_grad"])), 0.0)]

    total = torch.stack([g.double().norm() for g in gradients]).norm()
    kinds = ("grad_norm64",) if dtype == torch.float64 else ("grad_norm64", "grad_norm")
    for kind in kinds:
        recorded = {name: value for name, value in arrays.items() if name.startswith(f"{kind}/")}
        for name, value in recorded.items():
            norm = _ours(model, name.split("/", 1)[1]).grad.double().norm()
            results.append(Result(case, name, relative_difference(norm, value), tolerance))
        results.append(Result(case, f"{kind}_total", relative_difference(total, arrays[f"{kind}_total"]), tolerance))
    for name, value in arrays.items():
        if name.startswith("grad_first32/") and dtype == torch.float64:
            first = _ours(model, name.split("/", 1)[1]).grad.flatten()[: value.size].reshape(value.shape)
            results.append(Result(case, name, relative_difference(first, value), GRADIENT_TOLERANCES[task]))
    return results
