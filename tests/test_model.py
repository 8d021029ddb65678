"""The whole model, tiny, for all three tasks: training, inference, and errors for bad examples."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances, PolygonMasks
from helpers import (
    IGNORE,
    TASKS,
    expected_losses,
    make_batch,
    make_example,
    slow_bilinear,
    spread_scores,
    tiny_config,
    tiny_model,
)

from knet_d2.data.ground_truth import ground_truth_of
from knet_d2.errors import DataError
from knet_d2.modeling.cascade import static_predictions
from knet_d2.modeling.meta_arch import KNet
from knet_d2.modeling.postprocessing import ImageGeometry, mask_probabilities
from knet_d2.modeling.targets import build_targets
from knet_d2.tasks import TASKS

COUNTS = [[0], [2], [9], [0, 0], [3, 0], [1, 8, 0]]  # instances of each image; there are 6 kernels
RESULT_OF_TASK = {"instance": "instances", "panoptic": "panoptic_seg", "semantic": "sem_seg"}
ALL_OUTPUTS = ["panoptic_seg", "instances", "sem_seg"]
BANK = TASKS["panoptic"].bank(num_matched=6, num_things=3, num_stuff=2)


def example(size=(64, 64), count=2, **changes):
    """A training example in which some keys are replaced (None: removed)."""
    x = {**make_example(size, count), **changes}
    return {key: value for key, value in x.items() if value is not None}


@pytest.fixture(scope="module")
def models():
    """One model per task; in training mode, as built."""
    return {task: tiny_model(task) for task in TASKS}


@pytest.fixture(scope="module")
def trained():
    """In evaluation mode, with scores all over (0, 1)."""
    return {t: spread_scores(tiny_model(t)).eval() if t != "semantic" else tiny_model(t).eval() for t in TASKS}


# Training


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_losses_and_gradients_of_any_batch(models, task, counts):
    model = models[task].train()
    model.zero_grad()
    losses = model(make_batch(counts))
    assert set(losses) == expected_losses(task)
    assert all(value.dim() == 0 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for stage in model.cascade.stages if sum(counts) else ():
        assert stage.mask_branch[-1].weight.grad.abs().sum() > 0
        assert stage.feature_transform.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_a_few_steps_lower_the_loss(task):
    model, batch = tiny_model(task), [make_example((64, 64), 3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals = []
    for _ in range(8):
        total = sum(model(batch).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]


def test_instances_may_be_polygons(models):
    polygon = [10.0, 12.0, 50.0, 12.0, 50.0, 44.0, 10.0, 44.0]
    box = torch.zeros(1, 64, 64, dtype=torch.bool)
    box[0, 12:44, 10:50] = True
    losses = []
    for masks in (PolygonMasks([[polygon]]), BitMasks(box)):
        x = example(instances=Instances((64, 64), gt_classes=torch.tensor([1]), gt_masks=masks))
        with torch.no_grad():
            losses.append(models["instance"].train()([x]))
    assert {k: v.item() for k, v in losses[0].items()} == pytest.approx({k: v.item() for k, v in losses[1].items()})


def test_an_image_without_instances_needs_no_masks(models):
    empty = Instances((64, 64), gt_classes=torch.zeros(0, dtype=torch.int64))
    losses = models["panoptic"].train()([example(instances=empty), example(count=2)])
    assert all(value.isfinite() for value in losses.values())


def test_targets_are_padded_then_resized_and_stay_soft():
    x = make_example((45, 61), 2)
    x["instances"].gt_masks.tensor[0, 2:30, 10:31] = True
    targets = build_targets(ground_truth_of(x, BANK, IGNORE), torch.zeros(1, 3, 64, 96).double(), (16, 24), IGNORE)
    padded = torch.zeros(2, 64, 96)
    padded[:, :45, :61] = x["instances"].gt_masks.tensor
    for mask, result in zip(padded, targets.masks):
        torch.testing.assert_close(result, torch.from_numpy(slow_bilinear(mask, (16, 24))))
    assert ((targets.masks > 0) & (targets.masks < 1)).any()
    assert targets.stuff_classes.tolist() == [3, 4]
    labels = torch.full((64, 96), IGNORE)
    labels[:45, :61] = x["sem_seg"]
    assert torch.equal(targets.sem_seg, labels)
    for label, result in zip((3, 4), targets.stuff_masks):
        torch.testing.assert_close(result, torch.from_numpy(slow_bilinear(labels == label, (16, 24))))


def test_void_and_thing_pixels_are_no_stuff():
    labels = torch.full((64, 64), IGNORE)
    labels[:10] = 1
    truth = ground_truth_of(example(sem_seg=labels), BANK, IGNORE)
    targets = build_targets(truth, torch.zeros(1, 3, 64, 64), (16, 16), IGNORE)
    assert targets.stuff_classes.tolist() == []
    assert targets.stuff_masks.shape == (0, 16, 16)


# Inference


@pytest.mark.parametrize("task, key", RESULT_OF_TASK.items())
def test_results_have_detectron2_s_format_and_the_size_that_is_asked_for(trained, task, key):
    batch = [{"image": x["image"]} for x in make_batch([1, 1, 1])]
    batch[1].update(height=100, width=33)
    with torch.no_grad():
        results = trained[task](batch)
    for result, size in zip(results, [(64, 64), (100, 33), (96, 40)], strict=True):
        assert set(result) == {key}
        if task == "instance":
            instances = result["instances"]
            count = min(100, 6 * 3)
            assert instances.image_size == size and len(instances) == count
            assert instances.pred_masks.shape == (count, *size) and instances.pred_masks.dtype == torch.bool
            assert instances.pred_boxes.tensor.shape == (count, 4)
            assert (instances.scores.diff() <= 0).all()
            assert set(instances.pred_classes.tolist()) <= {0, 1, 2}
        elif task == "panoptic":
            panoptic, segments = result["panoptic_seg"]
            assert panoptic.shape == size and panoptic.dtype == torch.int32
            assert set(panoptic.unique().tolist()) - {0} == {s["id"] for s in segments}
            assert all(set(s) == {"id", "isthing", "category_id", "score", "area"} for s in segments)
        else:
            assert result["sem_seg"].shape == (5, *size)


@pytest.mark.parametrize("stage", [-1, 0, 1, 3])
def test_results_come_from_the_stage_that_is_asked_for(stage):
    model = spread_scores(tiny_model("instance", {"MODEL.KNET.TEST.STAGE": stage})).eval()
    x = {"image": make_example((64, 64), 0)["image"]}
    seen = []
    model.sem_seg_head.register_forward_hook(lambda m, args, output: seen.append(static_predictions(output)))
    model.cascade.register_forward_hook(lambda m, args, output: seen.extend(output))
    with torch.no_grad():
        instances = model([x])[0]["instances"]
    expected = seen[3 if stage == -1 else stage]
    scores, pairs = expected.class_logits[0].sigmoid().flatten().topk(1)
    assert instances.scores[0] == scores[0] and instances.pred_classes[0] == pairs[0] % 3
    geometry = ImageGeometry((64, 64), (64, 64), (64, 64))
    mask = mask_probabilities(expected.mask_logits[0][pairs // 3], geometry)[0] > 0.5
    assert torch.equal(instances.pred_masks[0], mask)


def test_semantic_logits_are_resized_to_the_input_then_to_the_output():
    model, image = tiny_model("semantic").double().eval(), make_example((50, 75), 0)["image"]
    seen = []
    model.cascade.register_forward_hook(lambda m, args, output: seen.append(output[-1].mask_logits))
    with torch.no_grad():
        result = model([{"image": image, "height": 20, "width": 31}])[0]["sem_seg"]
    for logits, expected in zip(seen[0][0], result):
        resized = slow_bilinear(slow_bilinear(logits, (50, 75)), (20, 31))
        torch.testing.assert_close(expected, torch.from_numpy(resized))


def test_semantic_results_do_not_depend_on_the_batch(trained):
    batch = [{"image": x["image"]} for x in (*make_batch([0, 0, 0]), make_example((64, 64), 1))]
    with torch.no_grad():
        together = trained["semantic"](batch)
        for x, result in zip(batch, together, strict=True):
            alone = trained["semantic"]([x])[0]["sem_seg"]
            torch.testing.assert_close(result["sem_seg"], alone, rtol=1e-4, atol=1e-5)


def test_images_are_normalised_then_padded_with_zeros():
    cfg = tiny_config("panoptic", {"MODEL.PIXEL_MEAN": [1, 2, 3], "MODEL.PIXEL_STD": [2.0, 4.0, 8.0]})
    model = KNet(cfg)  # whole numbers in the config are no reason to compute with whole numbers
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    images = model.preprocess_image([{"image": image}])
    assert images.tensor.shape == (1, 3, 64, 96)
    for c, (mean, std) in enumerate([(1, 2), (2, 4), (3, 8)]):
        torch.testing.assert_close(images.tensor[0, c, :50, :70], (image[c].float() - mean) / std)
    assert images.tensor[..., 50:, :].abs().max() == images.tensor[..., 70:].abs().max() == 0


@pytest.mark.parametrize("outputs", [["instances"], ["sem_seg", "panoptic_seg"], ALL_OUTPUTS])
def test_a_panoptic_model_gives_the_outputs_that_are_asked_for(outputs):
    model = spread_scores(tiny_model("panoptic", {"MODEL.KNET.TEST.OUTPUTS": outputs})).eval()
    with torch.no_grad():
        result = model([{"image": make_example((64, 64), 0)["image"]}])[0]
    assert set(result) == set(outputs)
    if "instances" in outputs:
        assert set(result["instances"].pred_classes.tolist()) == {0, 1, 2}
    if "sem_seg" in outputs:
        assert result["sem_seg"].shape == (5, 64, 64)


@pytest.mark.parametrize("stages", [0, 1, 4])
def test_number_of_stages(stages):
    options = {"MODEL.KNET.NUM_STAGES": stages}
    model = tiny_model("semantic", options)
    batch = make_batch([1, 1])
    keys = set(model(batch))
    assert keys == {f"loss_rank_s{i}" for i in range(stages + 1)} | {"loss_auxiliary"}
    with torch.no_grad():
        assert model.eval()(batch)[0]["sem_seg"].shape == (5, 64, 64)
    if stages:
        keys = set(tiny_model("panoptic", options)(batch))
        assert {int(key[-1]) for key in keys} == set(range(stages + 1))


def test_static_kernels_alone_give_the_decode_head_s_logits():
    model = tiny_model("semantic", {"MODEL.KNET.NUM_STAGES": 0}).double().eval()
    x = make_example((64, 64), 0)
    with torch.no_grad():
        result = model([x])[0]["sem_seg"]
        logits = model.sem_seg_head(model.backbone(model.preprocess_image([x]).tensor)).mask_logits
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)[0])


# Errors


@pytest.mark.parametrize(
    "task, changes, message",
    [
        ("panoptic", {"sem_seg": torch.zeros(32, 64)}, r"0\.jpg: 'sem_seg' is \(32, 64\), but its image is \(64, 64\)"),
        ("panoptic", {"sem_seg": torch.full((64, 64), 5)}, r"0\.jpg: 'sem_seg' has labels \[5\]; expected 0 \.\. 4"),
        ("semantic", {"sem_seg": torch.full((64, 64), -1)}, r"0\.jpg: 'sem_seg' has labels \[-1\].*IGNORE_VALUE"),
        ("semantic", {"sem_seg": None}, r"0\.jpg has no 'sem_seg'.*MODEL\.KNET\.TASK"),
        ("instance", {"instances": None}, r"0\.jpg has no 'instances'.*DATASETS\.TRAIN"),
        ("instance", {"image": torch.zeros(1, 64, 64)}, r"0\.jpg: shape \(1, 64, 64\), expected \(3, .*INPUT\.FORMAT"),
        ("instance", {"image": torch.zeros(64, 64)}, r"0\.jpg: shape \(64, 64\), expected \(3, "),
    ],
)
def test_bad_training_examples(models, task, changes, message):
    with pytest.raises(DataError, match=message):
        models[task].train()([example(**changes)])


@pytest.mark.parametrize(
    "classes, masks, message",
    [
        ([0, 3], torch.zeros(2, 64, 64), r"0\.jpg: instance classes \[0, 3\].*0 \.\. 2.*NUM_THING_CLASSES"),
        ([-1], torch.zeros(1, 64, 64), r"0\.jpg: instance classes \[-1\]"),
        ([0], torch.zeros(1, 64, 32), r"0\.jpg: .*masks are \(64, 32\), but its image is \(64, 64\)"),
        ([0], None, r"0\.jpg: .*no masks"),
    ],
)
def test_bad_instances(models, classes, masks, message):
    instances = Instances((64, 64), gt_classes=torch.tensor(classes))
    if masks is not None:
        instances.gt_masks = BitMasks(masks)
    with pytest.raises(DataError, match=message):
        models["instance"].train()([example(instances=instances)])
