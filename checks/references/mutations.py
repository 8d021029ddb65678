"""Wrong versions of parts of the model; the comparison must fail for each of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from knet_d2.modeling import cascade, criterion, loss_batches
from knet_d2.modeling.backbone import swin
from knet_d2.modeling.layers import upsample_masks
from knet_d2.modeling.losses import dice_coefficient
from knet_d2.modeling.postprocessing import cells, resize
from knet_d2.modeling.static_kernels import semantic_fpn
from knet_d2.modeling.structures import Match, Targets
from knet_d2.modeling.targets import last_nonzero

# (owner, attribute, replacement)
Patch = tuple[Any, str, Any]

INSTANCE, PANOPTIC = "ref_ins_r50_b", "ref_pan_r50_b"
SWIN = "ref_seg_uper_swint_b"
TRAINING, INSTANCE_TRAINING, SEMANTIC_TRAINING = "train_pan_r50_two", "train_ins_r50_noinst", "train_seg_fcn_two"


class Mutation(NamedTuple):
    """A wrong version of a part of the model.

    Attributes:
        patches: function that returns the patches for a model.
        cases: reference files; the comparison must fail for at least one of them.
    """

    patches: Callable[[torch.nn.Module], Sequence[Patch]]
    cases: Sequence[str]


@contextmanager
def mutated(mutation: Mutation, model: torch.nn.Module) -> Iterator[None]:
    """Apply a mutation inside a ``with`` block."""
    with ExitStack() as stack:
        for patch in mutation.patches(model):
            stack.enter_context(mock.patch.object(*patch))
        yield


def _mean_gather(model) -> Sequence[Patch]:
    original = cascade.gather_group_features

    def gather(weights: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        area = weights.sum(dim=(2, 3)).clamp(min=1)[..., None]
        return original(weights, feature) / area

    return [(module, "gather_group_features", gather) for module in (semantic_fpn, cascade)]


def _at_least(model) -> Sequence[Patch]:
    return [(torch.Tensor, "__gt__", torch.Tensor.__ge__)]


def _padding_not_cropped(model) -> Sequence[Patch]:
    original = cells.Cells
    return [(cells, "Cells", lambda logits, geometry: original(logits, geometry._replace(image=geometry.padded)))]


def _sigmoid_first(model) -> Sequence[Patch]:
    def probabilities(mask_logits: torch.Tensor) -> torch.Tensor:
        return upsample_masks(mask_logits.sigmoid()[:, None])[:, 0]

    return [(module, "upsampled_probabilities", probabilities) for module in (resize, cells)]


def _stuff_over_things(model) -> Sequence[Patch]:
    def labels(targets: Targets, match: Match, background: int) -> torch.Tensor:
        _, instances = match
        masks = torch.cat([targets.masks[instances], targets.stuff_masks])
        classes = torch.cat([targets.classes[instances], targets.stuff_classes])
        return last_nonzero(masks, classes, background)

    return [(criterion, "dense_labels", labels)]


def _things_over_stuff(model) -> Sequence[Patch]:
    original, num_matched = criterion.rank_targets, model.bank.num_matched

    def targets(positives):
        image_then_stuff_first = 2 * positives.image_index + (positives.kernel_index < num_matched)
        order = image_then_stuff_first.argsort(stable=True)
        return original(
            positives._replace(kernel_index=positives.kernel_index[order], target_masks=positives.target_masks[order])
        )

    return [(criterion, "rank_targets", targets)]


def _normalised_by_things(model) -> Sequence[Patch]:
    original = criterion.TERMS["class"]

    def loss(self, batch, stage, weight):
        positives = batch.positives(stage)
        things = int((positives.kernel_index < self.bank.num_matched).sum())
        return original.compute(self, batch, stage, weight)[0], things

    return [(criterion, "TERMS", {**criterion.TERMS, "class": original._replace(compute=loss)})]


def _encoding_x_first(model) -> Sequence[Patch]:
    original = semantic_fpn.sine_position_encoding

    def encoding(x):
        return torch.cat(original(x).chunk(2, dim=1)[::-1], dim=1)

    return [(semantic_fpn, "sine_position_encoding", encoding)]


def _encoding_from_zero(model) -> Sequence[Patch]:
    original = semantic_fpn._normalised_positions

    def positions(length, x):
        values = original(length, x)
        return values - values[0]

    return [(semantic_fpn, "_normalised_positions", positions)]


def _without_bank(model) -> Sequence[Patch]:
    original = semantic_fpn.SemanticFPNKernelHead.forward

    def forward(self, features, image_sizes=None):
        state = original(self, features, image_sizes)
        learned = torch.zeros_like(state.kernels)
        learned[:, : len(self.instance_kernels.weight)] = self.instance_kernels.weight.flatten(1)
        return state._replace(kernels=state.kernels - learned)

    return [(semantic_fpn.SemanticFPNKernelHead, "forward", forward)]


def _dice_without_squares(model) -> Sequence[Patch]:
    def dice(logits, targets):
        probs, targets = logits.sigmoid().flatten(1), targets.flatten(1)
        coefficient = dice_coefficient((probs * targets).sum(1), probs.sum(1), targets.sum(1))
        return (1 - coefficient).sum() / max(len(coefficient), 1)

    return [(criterion, "dice_loss", dice)]


def _mean_over_owned(model) -> Sequence[Patch]:
    def loss(logits, targets, ignore_value):
        logits = F.interpolate(logits, targets.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, targets, ignore_index=ignore_value)

    return [(criterion, "kernel_cross_entropy", loss)]


def _own_matches(model) -> Sequence[Patch]:
    original, num_matched = loss_batches.MatchedBatch.candidates, model.bank.num_matched

    def candidates(self):
        own = [loss_batches.Candidates(masks, None) for masks in self.compared_logits(1)[:, :num_matched]]
        return [own, *original(self)[1:]]

    return [(loss_batches.MatchedBatch, "candidates", candidates)]


def _only_confident_compete(model) -> Sequence[Patch]:
    original = cells.assign_pixels

    def assign(scores, *others):
        return original(scores.where(scores >= model.postprocessor.options.thing_score_threshold, 0), *others)

    return [(cells, "assign_pixels", assign)]


def _release_merging(model) -> Sequence[Patch]:
    def forward(self, x):
        x = swin.pad_to_multiple(x, 2)
        neighbours = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))

    return [(swin.PatchMerging, "forward", forward)]


def _no_shift_mask(model) -> Sequence[Patch]:
    original = swin.shifted_window_mask
    return [(swin, "shifted_window_mask", lambda *args: torch.zeros_like(original(*args)))]


MUTATIONS = {
    "mean for sum in the gather": Mutation(_mean_gather, (INSTANCE, PANOPTIC)),
    "at least for greater than": Mutation(_at_least, (INSTANCE, TRAINING)),
    "padding not cropped": Mutation(_padding_not_cropped, (INSTANCE, PANOPTIC)),
    "up-sampling after the sigmoid": Mutation(_sigmoid_first, (INSTANCE, PANOPTIC)),
    "position encoding x first": Mutation(_encoding_x_first, (INSTANCE, PANOPTIC)),
    "position encoding from 0": Mutation(_encoding_from_zero, (INSTANCE, PANOPTIC)),
    "static kernels without the learned ones": Mutation(_without_bank, (INSTANCE, PANOPTIC)),
    "low scores do not compete for pixels": Mutation(_only_confident_compete, (PANOPTIC,)),
    "stuff over things in the dense target": Mutation(_stuff_over_things, (TRAINING,)),
    "things over stuff in the rank target": Mutation(_things_over_stuff, (TRAINING,)),
    "class loss normalised by things only": Mutation(_normalised_by_things, (TRAINING,)),
    "dice without squares": Mutation(_dice_without_squares, (TRAINING, INSTANCE_TRAINING)),
    "rank loss averaged over owned pixels": Mutation(_mean_over_owned, (TRAINING, SEMANTIC_TRAINING)),
    "first stage matched on its own masks": Mutation(_own_matches, (TRAINING, INSTANCE_TRAINING)),
    "patch merging in the Swin release's order": Mutation(_release_merging, (SWIN,)),
    "shifted windows without a mask": Mutation(_no_shift_mask, (SWIN,)),
}
