"""Kernels that exist in training only: denoising, and the group with several kernels for each instance."""

import logging
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import IGNORE, IMAGE_KERNELS, expected_losses, make_example, tiny_model
from program_helpers import shapes, write_config  # noqa: F401
from toys import assert_identical

from knet_d2.checkpoint import Checkpointer
from knet_d2.data.ground_truth import ground_truth_of
from knet_d2.engine import Trainer, load_config
from knet_d2.engine.validation import mean_loss
from knet_d2.errors import ConfigError, NonFiniteError
from knet_d2.export import ExportableKNet
from knet_d2.modeling.layers import upsample_masks
from knet_d2.modeling.losses import dice_loss, focal_loss, mask_loss
from knet_d2.modeling.matcher import HungarianMatcher
from knet_d2.modeling.structures import KernelState
from knet_d2.modeling.training_kernels import noised_masks

DENOISING = {"MODEL.KNET.DENOISING.NUM_KERNELS": 10}
ONE_TO_MANY = {"MODEL.KNET.ONE_TO_MANY.NUM_KERNELS": 9, "MODEL.KNET.ONE_TO_MANY.REPEATS": 3}
GROUPS = {**DENOISING, **ONE_TO_MANY}
POINTS = {"MODEL.KNET.LOSS.NUM_POINTS": 60}
GROUP_LOSSES = {
    f"loss_{term}_{group}_s{i}" for term in ("class", "mask", "dice") for group in ("dn", "o2m") for i in (1, 2, 3)
}
GROUP_LOSSES |= {"loss_mask_o2m_s0", "loss_dice_o2m_s0"}


def seeded(model, counts, size=(64, 64)):
    """Examples with their ground truth, as a loader gives them; image i has the seed 100 + i."""
    examples = [make_example(size, count, seed=i) for i, count in enumerate(counts)]
    return [
        {"image": x["image"], "ground_truth": ground_truth_of(x, model.bank, IGNORE)._replace(seed=100 + i)}
        for i, x in enumerate(examples)
    ]


def groups_of(model, batch):
    """The predictions of the training groups by name, the static kernels, and the targets."""
    images = model.preprocess_image(batch)
    state = model.network(images.tensor, torch.tensor(images.image_sizes)).state
    targets = model.prepare_targets(model.send_ground_truth(batch), images, state)
    return {x.name: x for x in model.training_kernels(model.cascade, state, targets)}, state, targets


def frozen_norms(model):
    """Train without the statistics of a batch, which mix its images."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


# ---- noised masks


def box(rows, columns, size=(16, 24)):
    mask = torch.zeros(size, dtype=torch.float64)
    mask[slice(*rows), slice(*columns)] = 1
    return mask


@pytest.mark.parametrize(
    "draws, rows, columns",
    [
        ((0.0, 0.0, 0.0, 0.0), (4, 8), (6, 14)),
        ((0.5, -0.5, 0.0, 0.0), (3, 7), (8, 16)),  # half sides are 4 and 2 cells
        ((0.0, 0.0, 0.5, -0.5), (5, 7), (4, 16)),  # 12 cells wide, 2 high, around the same place
        ((0.25, 0.5, -0.25, 0.5), (4, 10), (8, 14)),
    ],
)
def test_a_box_is_shifted_and_scaled(draws, rows, columns):
    found = noised_masks(box((4, 8), (6, 14))[None], torch.tensor([draws], dtype=torch.float64))
    assert torch.equal(found[0], box(rows, columns) > 0)


def test_only_what_stays_on_the_map_is_left_and_a_mask_never_gets_lost():
    masks = torch.stack([box((0, 4), (20, 24)), box((15, 16), (0, 1)) / 64, box((0, 0), (0, 0))])
    far = torch.tensor([[1.0, 0, 0, 0], [-9.0, 9, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    found = noised_masks(masks, far)
    assert torch.equal(found[0], box((0, 4), (22, 24)) > 0)
    assert found[1].nonzero().tolist() == [[15, 0]]  # one pixel of a cell of 8 x 8
    assert not found[2].any()


def test_noise_is_as_large_as_the_option_says():
    model = tiny_model("instance", {**DENOISING, "MODEL.KNET.DENOISING.NUM_KERNELS": 200}).train()
    example = make_example((192, 192), 1)
    example["instances"].gt_masks.tensor[:] = F.pad(torch.ones(1, 80, 80), (56, 56, 56, 56)) > 0
    masks = groups_of(model, [example])[0]["dn"].state.mask_logits[0] > 0
    assert masks.shape == (200, 24, 24)
    for axis in (1, 2):
        is_covered = masks.any(3 - axis)
        sides = is_covered.sum(1)  # of 10 cells
        assert 6 <= sides.min() <= 7 and 13 <= sides.max() <= 14
        places = (is_covered * (torch.arange(24) + 0.5)).sum(1) / sides
        assert 10 <= places.min() < 10.5 and 13.5 < places.max() <= 14


# ---- denoising kernels


def test_kernels_are_the_vector_and_the_feature_under_the_mask():
    model = tiny_model("panoptic", {**DENOISING, "MODEL.KNET.DENOISING.NOISE": 0.0}).double().train()
    batch = seeded(model, [3, 0])
    groups, state, targets = groups_of(model, batch)
    group, start = groups["dn"].state, model.training_kernels.groups["denoising"].start
    assert group.kernels.shape == (2, 9, 32) and [len(x) for x in groups["dn"].instances] == [9, 0]
    assert groups["dn"].instances[0].tolist() == 3 * [0, 1, 2]
    whole = batch[0]["ground_truth"].masks().double()
    for kernel, masks, instance in zip(group.kernels[0], group.mask_logits[0], groups["dn"].instances[0]):
        share = F.avg_pool2d(whole[instance][None], 8)[0]
        cells = share >= share.max() / 2
        assert torch.equal(masks > 0, cells) and cells.any()
        torch.testing.assert_close(kernel, start + state.feature[0][:, cells].sum(dim=1))
    assert (group.kernels[1] == start).all() and (group.mask_logits[1] < 0).all()


@pytest.mark.parametrize("count, kernels", [(0, 0), (1, 10), (3, 9), (4, 8), (10, 10), (11, 10), (200, 10)])
def test_number_of_kernels_follows_the_image_alone(count, kernels):
    model = tiny_model("instance", DENOISING).train()
    groups, _, targets = groups_of(model, seeded(model, [count, 2]))
    instances = groups["dn"].instances[0].tolist()
    assert len(instances) == kernels and len(groups["dn"].instances[1]) == 10
    assert len(set(instances)) == min(count, 10) and all(x < count for x in instances)
    if count > 10:
        assert instances != sorted(instances)


def test_a_repetition_is_alone_in_the_interaction():
    """Each repetition of the instances has what the cascade makes of its kernels without all others."""
    model = tiny_model("instance", DENOISING).double().train()
    groups, state, _ = groups_of(model, seeded(model, [3, 1]))
    group = groups["dn"]
    repetitions = [(0, slice(0, 3)), (0, slice(3, 6)), (0, slice(6, 9)), (1, slice(4, 5))]
    for image, kernels in repetitions:
        first = (group.state.kernels[image, None, kernels], group.state.mask_logits[image, None, kernels])
        alone = model.cascade(KernelState(state.feature[image, None], *first))
        for together, expected in zip(group.stages, alone):
            torch.testing.assert_close(together.class_logits[image, None, kernels], expected.class_logits)
            torch.testing.assert_close(together.mask_logits[image, None, kernels], expected.mask_logits)
    seeing_all = model.cascade(group.state)[-1].class_logits
    assert not torch.allclose(seeing_all, group.stages[-1].class_logits)


def test_classes_of_the_groups_read_the_pyramid_as_those_of_the_model():
    model = tiny_model("instance", {**GROUPS, "MODEL.KNET.UPDATE_HEAD.POOLED_CLASSES": True}).train()
    groups, state, _ = groups_of(model, seeded(model, [3, 1]))
    assert len(groups) == 2 and all(x.state.pyramid_feature is state.pyramid_feature for x in groups.values())


def test_denoising_without_interaction():
    model = tiny_model("instance", {**DENOISING, "MODEL.KNET.UPDATE_HEAD.KERNEL_INTERACTION": False}).train()
    assert model(seeded(model, [2]))["loss_mask_dn_s3"] > 0


def test_noise_follows_the_seed_of_the_image():
    model = tiny_model("instance", DENOISING).train()
    batch = seeded(model, [2, 2])
    masks = groups_of(model, batch)[0]["dn"].state.mask_logits
    again = groups_of(model, batch[::-1])[0]["dn"].state.mask_logits
    assert torch.equal(masks, again.flip(0))
    double = groups_of(model.double(), batch)[0]["dn"].state.mask_logits
    assert torch.equal(masks, double.float())
    batch[0]["ground_truth"] = batch[0]["ground_truth"]._replace(seed=5)
    other = groups_of(model, batch)[0]["dn"].state.mask_logits
    assert torch.equal(other[1], double[1]) and not torch.equal(other[0], double[0])


# ---- losses


@pytest.mark.parametrize("options", [{}, POINTS, {**IMAGE_KERNELS, **POINTS}])
@pytest.mark.parametrize("task", ["instance", "panoptic"])
@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_the_groups_change_no_other_loss(task, options, counts):
    without, model = (tiny_model(task, {**options, **groups}).train() for groups in ({}, GROUPS))
    batch = seeded(model, counts)
    losses, expected = model(batch), without(batch)
    assert set(losses) == set(expected) | GROUP_LOSSES
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss), name
    is_empty = {losses[name].item() == 0 for name in GROUP_LOSSES if "class_o2m" not in name}
    assert is_empty == {counts == (0, 0)}


def test_denoising_losses_closed_form():
    model = tiny_model("panoptic", {**DENOISING, "MODEL.KNET.DENOISING.WEIGHT": 0.5}).double().train()
    batch = seeded(model, [3, 0, 4])
    groups, _, targets = groups_of(model, batch)
    group, losses = groups["dn"], model(batch)
    things = torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64)
    for i, stage in enumerate(group.stages, start=1):
        logits, goals, scores, classes = [], [], [], []
        for b, instances in enumerate(group.instances):
            logits.append(upsample_masks(stage.mask_logits)[b, : len(instances)])
            goals.append(targets[b].masks[instances])
            scores.append(stage.class_logits[b, : len(instances)])
            classes.append(F.one_hot(targets[b].classes[instances], 5).double())
        logits, goals, scores, classes = map(torch.cat, (logits, goals, scores, classes))
        assert len(logits) == 9 + 8
        expected = {
            "mask": 0.5 * mask_loss(logits, goals),
            "dice": 0.5 * 4 * dice_loss(logits, goals),
            "class": 0.5 * 2 * focal_loss(scores, classes, things, alpha=0.25, gamma=2.0) / 17,
        }
        for term, value in expected.items():
            assert losses[f"loss_{term}_dn_s{i}"].item() == pytest.approx(value.item(), rel=1e-12)


def test_one_to_many_losses_closed_form(monkeypatch):
    """Each stage learns from the match of the stage before; the unmatched kernels have no class."""
    matched = []
    match = HungarianMatcher.match

    def record(self, stages, classes, masks):
        matched.extend(match(self, stages, classes, masks))
        return matched

    model = tiny_model("panoptic", {**ONE_TO_MANY, "MODEL.KNET.ONE_TO_MANY.WEIGHT": 0.5}).double().train()
    batch = seeded(model, [2, 0])
    groups, state, targets = groups_of(model, batch)
    monkeypatch.setattr(HungarianMatcher, "match", record)
    losses, group = model(batch), groups["o2m"]
    assert len(matched) == 6  # of the model's kernels, then of the group, by one call
    things = torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64)
    first, learned = group.state, model.training_kernels.groups["one_to_many"].kernels.weight.flatten(1)
    torch.testing.assert_close(first.mask_logits, F.conv2d(state.localization_feature, learned[..., None, None]))
    hard = (first.mask_logits > 0).double()
    torch.testing.assert_close(first.kernels, learned + torch.einsum("bnhw,bchw->bnc", hard, state.feature))
    for i, output in enumerate([first, *group.stages]):
        kernels, instances = matched[3 + max(i - 1, 0)][0]
        assert instances.sort().values.tolist() == [0, 0, 0, 1, 1, 1] and len(kernels.unique()) == 6
        logits, goals = upsample_masks(output.mask_logits)[0, kernels], targets[0].masks[instances]
        assert losses[f"loss_mask_o2m_s{i}"].item() == pytest.approx(0.5 * mask_loss(logits, goals).item(), rel=1e-12)
        assert losses[f"loss_dice_o2m_s{i}"].item() == pytest.approx(2 * dice_loss(logits, goals).item(), rel=1e-12)
        if i:
            classes = torch.zeros_like(output.class_logits)
            classes[0, kernels, targets[0].classes[instances]] = 1
            expected = focal_loss(output.class_logits, classes, things, alpha=0.25, gamma=2.0) / 6
            assert losses[f"loss_class_o2m_s{i}"].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("count, number", [(2, 3), (4, 2), (9, 1), (20, 1)])
def test_crowded_images_repeat_their_instances_less(count, number, monkeypatch):
    seen = []
    match = HungarianMatcher.match
    monkeypatch.setattr(HungarianMatcher, "match", lambda *args: seen.extend(match(*args)) or seen)
    model = tiny_model("instance", ONE_TO_MANY).train()
    model(seeded(model, [count]))
    times = torch.bincount(seen[-1][0][1], minlength=count)
    assert set(times.tolist()) == ({number} if count <= 9 else {0, 1}) and times.sum() == min(9, count * number)


def test_costs_that_are_not_finite_name_the_group():
    model = tiny_model("instance", ONE_TO_MANY).train()
    torch.nn.init.constant_(model.training_kernels.groups["one_to_many"].kernels.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="The mask cost of stage 0 of the group 'o2m' is not finite for image 0"):
        model(seeded(model, [2]))


@pytest.mark.parametrize("options", [{}, POINTS])
@torch.no_grad()
def test_an_image_is_the_same_beside_1_and_50_objects(options):
    model = frozen_norms(tiny_model("instance", {**GROUPS, **options}).double())
    alone, few, many = (seeded(model, counts) for counts in ([2], [2, 1], [2, 50]))
    expected = groups_of(model, alone)[0]
    for batch in (few, many):
        for name, group in groups_of(model, batch)[0].items():
            number = expected[name].state.kernels.shape[1]
            for found, stage in zip(group.stages, expected[name].stages):
                for a, b in zip(found, stage):
                    torch.testing.assert_close(a[:1, :number], b, rtol=1e-9, atol=1e-9)
    # Two images of equal counts: the mean of what each has alone
    pair = seeded(model, [2, 2])
    together, parts = model(pair), [model([x]) for x in pair]
    for name in GROUP_LOSSES:
        assert together[name].item() == pytest.approx(sum(x[name].item() for x in parts) / 2, rel=1e-9), name


@pytest.mark.parametrize("task", ["instance", "panoptic"])
@pytest.mark.parametrize("options", [{}, {**IMAGE_KERNELS, **POINTS}])
@pytest.mark.parametrize("counts", [(0, 0), (200, 0), (1, 3)])
def test_empty_and_crowded_images_train_in_bfloat16(task, options, counts):
    model = tiny_model(task, {**GROUPS, **options}).train()
    batch = [make_example((64, 48), count, seed=i) for i, count in enumerate(counts)]
    if counts == (1, 3):
        masks = batch[1]["instances"].gt_masks.tensor
        masks[:] = False
        masks[0, 5, 7] = True  # a mask of one pixel; the others have none
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch)
    assert set(losses) >= expected_losses(task) | GROUP_LOSSES
    assert all(loss.isfinite() for loss in losses.values())
    assert {losses[name].dtype for name in GROUP_LOSSES} == {torch.float32}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if counts == (0, 0):
        assert not model.training_kernels.groups["denoising"].start.grad.any()


@pytest.mark.parametrize(
    "key, value, group",
    [
        ("DENOISING.NUM_KERNELS", 6, "dn"),
        ("DENOISING.NOISE", 0.1, "dn"),
        ("DENOISING.WEIGHT", 2.0, "dn"),
        ("ONE_TO_MANY.NUM_KERNELS", 8, "o2m"),
        ("ONE_TO_MANY.REPEATS", 2, "o2m"),
        ("ONE_TO_MANY.WEIGHT", 2.0, "o2m"),
    ],
)
def test_every_option_changes_the_losses_of_its_group_alone(key, value, group):
    model, other = (tiny_model("instance", {**GROUPS, **x}).train() for x in ({}, {f"MODEL.KNET.{key}": value}))
    batch = seeded(model, [2, 1])
    losses, changed = model(batch), other(batch)
    # The first group's parameters come before those of the other
    assert {name for name, x in losses.items() if not torch.equal(x, changed[name])} == {
        name for name in losses if f"_{group}_" in name
    }


@pytest.mark.parametrize(
    "task, key, value, text",
    [
        ("instance", "DENOISING.NUM_KERNELS", -1, "use 0 to leave"),
        ("semantic", "DENOISING.NUM_KERNELS", 100, "use 0 for a model without instances"),
        ("semantic", "ONE_TO_MANY.NUM_KERNELS", 9, "use 0 for a model without instances"),
        ("panoptic", "ONE_TO_MANY.REPEATS", 0, "use 1 or more"),
        ("panoptic", "ONE_TO_MANY.WEIGHT", 0.0, "use a number above 0"),
        ("panoptic", "DENOISING.NOISE", 1.0, "use 0 or more, less than 1"),
    ],
)
def test_bad_values(task, key, value, text):
    with pytest.raises(ConfigError, match=f"MODEL.KNET.{key} = {value}: {text}"):
        tiny_model(task, {f"MODEL.KNET.{key}": value})


# ---- in training only


def test_evaluated_and_exported_models_have_none_of_it():
    without, model = (tiny_model("panoptic", groups).eval() for groups in ({}, GROUPS))
    calls = []
    model.cascade.register_forward_hook(lambda *args: calls.append(args))
    images = [{"image": make_example((64, 96), 2)["image"]}]
    expected, found = (m(images, do_postprocess=False)[0] for m in (without, model))
    assert torch.equal(found.mask_logits, expected.mask_logits) and torch.equal(
        found.class_logits, expected.class_logits
    )
    assert len(calls) == 1
    exported = ExportableKNet(model)
    assert set(exported.state_dict()) == set(ExportableKNet(without).state_dict())
    assert set(model.state_dict()) - set(without.state_dict()) == {
        "training_kernels.groups.denoising.start",
        "training_kernels.groups.one_to_many.kernels.weight",
    }
    shared = dict(exported.named_parameters())
    assert all(shared[f"model.{name}"] is x for name, x in model.named_parameters() if "training_" not in name)


@torch.no_grad()
def test_the_validation_loss_is_that_of_the_evaluated_model():
    without, model = (tiny_model("panoptic", {**groups, **POINTS}) for groups in ({}, GROUPS))
    batches = [[x] for x in seeded(model, [2, 1])]
    assert mean_loss(model, batches, 2) == mean_loss(without, batches, 2)


@pytest.mark.parametrize("saved, loaded", [({}, GROUPS), (GROUPS, {})])
def test_a_weights_file_may_lack_them_or_have_them(tmp_path, caplog, saved, loaded):
    Checkpointer(tiny_model("instance", saved), str(tmp_path)).save("model")
    model = tiny_model("instance", loaded, seed=1)
    Checkpointer(model).load(str(tmp_path / "model.pth"))
    assert not [x for x in caplog.records if x.levelno >= logging.WARNING]
    assert torch.equal(
        model.cascade.stages[0].mask_branch[0].weight, tiny_model("instance").cascade.stages[0].mask_branch[0].weight
    )


def test_training_starts_from_a_file_with_another_number_of_kernels(tmp_path):
    Checkpointer(tiny_model("instance", GROUPS), str(tmp_path)).save("model")
    model = tiny_model("instance", {**GROUPS, "MODEL.KNET.ONE_TO_MANY.NUM_KERNELS": 4}, seed=1)
    checkpointer = Checkpointer(model, partial=True)
    checkpointer.load(str(tmp_path / "model.pth"))
    assert [x.name for x in checkpointer.report.other_shape] == ["training_kernels.groups.one_to_many.kernels.weight"]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, shapes):  # noqa: F811
    """To the last bit, with points and parts of batches."""
    config = write_config(tmp_path, shapes, "instance")

    def train(folder, resume):
        options = {
            **GROUPS,
            **POINTS,
            "SOLVER.ACCUMULATE_GRADIENTS": 2,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.MAX_ITER": 4,
        }
        options |= {"SOLVER.CHECKPOINT_PERIOD": 2, "TEST.EVAL_PERIOD": 0, "SEED": 7, "OUTPUT_DIR": str(folder)}
        cfg = load_config(config, [str(x) for pair in options.items() for x in pair])
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer

    whole, second = tmp_path / "whole", tmp_path / "second"
    train(whole, False)
    second.mkdir()
    shutil.copy(whole / "model_0000001.pth", second)
    (second / "last_checkpoint").write_text("model_0000001.pth")
    assert train(second, True).start_iter == 2
    files = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole, second)]
    assert_identical(files[0]["model"], files[1]["model"])
    assert_identical(files[0]["trainer"]["_trainer"]["optimizer"], files[1]["trainer"]["_trainer"]["optimizer"])
