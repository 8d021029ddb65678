"""The whole model, tiny, for all three tasks: training, inference, precision, devices, errors, and its config."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from helpers import IGNORE, TASKS, make_example, slow_bilinear, spread_scores, tiny_config, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from knet_d2.errors import ConfigError, DataError
from knet_d2.meta_arch import KNet
from knet_d2.modeling.cascade import KernelUpdateCascade
from knet_d2.modeling.precision import full_precision
from knet_d2.modeling.targets import build_targets
from knet_d2.postprocessing import ImageGeometry, mask_probabilities
from knet_d2.structures import KernelBank, KernelState, Targets

SIZES = [(64, 64), (50, 75), (96, 40)]
COUNTS = [[0], [2], [9], [0, 0], [3, 0], [1, 8, 0]]  # instances of each image; there are 6 kernels
BANK = KernelBank.for_task("panoptic", num_kernels=6, num_things=3, num_stuff=2)


def make_batch(counts, seed=0):
    return [make_example(size, count, seed=seed + i) for i, (size, count) in enumerate(zip(SIZES, counts))]


def expected_keys(task):
    if task == "semantic":
        return {f"loss_rank_s{i}" for i in range(4)} | {"loss_auxiliary"}
    terms = ("mask", "dice") if task == "instance" else ("mask", "dice", "rank")
    keys = {f"loss_{term}_s{i}" for term in terms for i in range(4)}
    return keys | {f"loss_class_s{i}" for i in range(1, 4)} | {"loss_dense_s0"}


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
    assert set(losses) == expected_keys(task)
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
            losses.append(copy.deepcopy(models["instance"])([x]))
    assert {k: v.item() for k, v in losses[0].items()} == pytest.approx({k: v.item() for k, v in losses[1].items()})


def test_an_image_without_instances_needs_no_masks(models):
    empty = Instances((64, 64), gt_classes=torch.zeros(0, dtype=torch.int64))
    losses = models["panoptic"].train()([example(instances=empty), example(count=2)])
    assert all(value.isfinite() for value in losses.values())


def test_targets_are_padded_then_resized_and_stay_soft():
    x = make_example((45, 61), 2)
    x["instances"].gt_masks.tensor[0, 2:30, 10:31] = True
    targets = build_targets(x, (64, 96), (16, 24), BANK, IGNORE, torch.zeros(1, dtype=torch.float64))
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
    targets = build_targets(example(sem_seg=labels), (64, 64), (16, 16), BANK, IGNORE, torch.zeros(1))
    assert targets.stuff_classes.tolist() == []
    assert targets.stuff_masks.shape == (0, 16, 16)


# Inference


@pytest.mark.parametrize("task, key", [("instance", "instances"), ("panoptic", "panoptic_seg"), ("semantic", "sem_seg")])
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


def test_results_come_from_the_last_stage(trained):
    model, x = trained["instance"], {"image": make_example((64, 64), 0)["image"]}
    seen = []
    handle = model.cascade.register_forward_hook(lambda m, args, output: seen.append(output[-1]))
    with torch.no_grad():
        instances = model([x])[0]["instances"]
    handle.remove()
    scores, pairs = seen[0].class_logits[0].sigmoid().flatten().topk(1)
    assert instances.scores[0] == scores[0] and instances.pred_classes[0] == pairs[0] % 3
    geometry = ImageGeometry((64, 64), (64, 64), (64, 64))
    mask = mask_probabilities(seen[0].mask_logits[0][pairs // 3], geometry)[0] > 0.5
    assert torch.equal(instances.pred_masks[0], mask)


def test_semantic_logits_are_resized_to_the_input_then_to_the_output(trained):
    model, image = trained["semantic"], make_example((50, 75), 0)["image"]
    seen = []
    handle = model.cascade.register_forward_hook(lambda m, args, output: seen.append(output[-1].mask_logits))
    with torch.no_grad():
        result = model([{"image": image, "height": 20, "width": 31}])[0]["sem_seg"]
    handle.remove()
    for logits, expected in zip(seen[0][0].double(), result.double()):
        resized = slow_bilinear(slow_bilinear(logits, (50, 75)), (20, 31))
        torch.testing.assert_close(expected, torch.from_numpy(resized), rtol=1e-4, atol=1e-5)


def test_semantic_results_do_not_depend_on_the_batch(trained):
    batch = [{"image": x["image"]} for x in (*make_batch([0, 0, 0]), make_example((64, 64), 1))]
    with torch.no_grad():
        together = trained["semantic"](batch)
        for x, result in zip(batch, together, strict=True):
            alone = trained["semantic"]([x])[0]["sem_seg"]
            torch.testing.assert_close(result["sem_seg"], alone, rtol=1e-4, atol=1e-5)


def test_images_are_normalised_then_padded_with_zeros(models):
    cfg = tiny_config("panoptic", {"MODEL.PIXEL_MEAN": [1, 2, 3], "MODEL.PIXEL_STD": [2.0, 4.0, 8.0]})
    model = KNet(cfg)  # whole numbers in the config are no reason to compute with whole numbers
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    images = model.preprocess_image([{"image": image}])
    assert images.tensor.shape == (1, 3, 64, 96)
    for c, (mean, std) in enumerate([(1, 2), (2, 4), (3, 8)]):
        torch.testing.assert_close(images.tensor[0, c, :50, :70], (image[c].float() - mean) / std)
    assert images.tensor[..., 50:, :].abs().max() == images.tensor[..., 70:].abs().max() == 0


@pytest.mark.parametrize("outputs", [["instances"], ["sem_seg", "panoptic_seg"], ["panoptic_seg", "instances", "sem_seg"]])
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


# Precision


@pytest.mark.parametrize("task", TASKS)
def test_double_precision_throughout(task):
    options = {"MODEL.KNET.DROPOUT": 0.0, "MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS": 32}
    options.update({"MODEL.RESNETS.RES2_OUT_CHANNELS": 32, "MODEL.RESNETS.WIDTH_PER_GROUP": 32})
    single, double = tiny_model(task, options), tiny_model(task, options).double()
    batch = make_batch([2, 0])
    losses, expected = single(batch), double(batch)
    assert {value.dtype for value in expected.values()} == {torch.float64}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=2e-2), name
    sum(expected.values()).backward()
    with torch.no_grad():
        result = double.eval()(batch)[0]
    tensors = {"instance": lambda: result["instances"].scores, "semantic": lambda: result["sem_seg"]}
    if task in tensors:
        assert tensors[task]().dtype == torch.float64


@pytest.mark.parametrize("task", TASKS)
def test_mixed_precision_has_float32_where_sums_are_taken(models, task):
    model = copy.deepcopy(models[task]).train()
    seen = {}

    def record(name):
        def hook(module, args, output):
            seen[name] = output

        return hook

    model.sem_seg_head.register_forward_hook(record("static"))
    model.cascade.register_forward_hook(record("stages"))
    costs = []
    compute = model.criterion.matcher.cost_terms
    model.criterion.matcher.cost_terms = lambda *args: costs.append(compute(*args)) or costs[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(make_batch([2, 0]))
    sum(losses.values()).backward()
    assert set(losses) == expected_keys(task)
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
    assert seen["static"].mask_logits.dtype == torch.bfloat16  # convolutions do use the half type
    for stage in seen["stages"]:
        assert {x.dtype for x in stage if x is not None} == {torch.float32}
    if task != "semantic":
        assert seen["static"].kernels.dtype == torch.float32
        assert {cost.dtype for terms in costs for cost in terms.values()} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result = model.eval()(make_batch([2, 0]))[0]
    if task == "semantic":
        assert result["sem_seg"].isfinite().all()


def test_semantic_output_of_a_panoptic_model_is_not_rounded_under_autocast():
    model = spread_scores(tiny_model("panoptic", {"MODEL.KNET.TEST.OUTPUTS": ["sem_seg"]})).eval()
    seen = []
    model.cascade.register_forward_hook(lambda m, args, output: seen.append(output))
    x = make_example((64, 64), 0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        images = model.preprocess_image([x])
        result = model([x])[0]["sem_seg"]
    expected = model.postprocess(None, seen[0], [x], images)[0]["sem_seg"]
    assert torch.equal(result, expected)


def test_sums_over_large_maps_do_not_overflow_half_precision():
    """40,000 pixels of 4 are 160,000, where float16 ends at 65,504."""
    torch.manual_seed(0)
    options = {"num_heads": 4, "ffn_dim": 16, "update_dim": 32}
    cascade = KernelUpdateCascade(num_stages=2, dim=32, num_classes=5, soft_gather=False, **options)
    feature = torch.full((1, 32, 200, 200), 4.0, dtype=torch.float16)
    masks = torch.ones(1, 8, 200, 200, dtype=torch.float16)
    state = KernelState(feature, torch.randn(1, 8, 32), masks)
    seen = []
    cascade.stages[0].kernel_update.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stages = cascade(state)
    transform = cascade.stages[0].feature_transform
    expected = (160_000 * transform.weight.sum(1) + 40_000 * transform.bias).expand(1, 8, -1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1.0)
    assert all(x.isfinite().all() and x.dtype == torch.float32 for stage in stages for x in stage)


def test_static_kernels_do_not_overflow_half_precision(models):
    head = copy.deepcopy(models["panoptic"].sem_seg_head)

    class Returns(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, *args):
            return self.value

    head.semantic_fpn = Returns(None)
    head.localization_branch = head.semantic_branch = Returns(torch.full((1, 32, 200, 200), 2.0).half())
    head.instance_kernels.forward = lambda x: torch.ones(1, 6, 200, 200).half()
    head.classifier.forward = lambda x: torch.ones(1, 5, 200, 200).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = head({})
    expected = head.instance_kernels.weight.flatten(1) + 160_000
    torch.testing.assert_close(state.kernels[0, :6], expected)


def test_full_precision_changes_half_types_only():
    types = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert full_precision(torch.zeros(1, dtype=dtype)).dtype == types.get(dtype, dtype)
    assert full_precision(None) is None


# Devices: with fake tensors, every operation on tensors of two devices is an error, without any GPU


def move_to_fake_cuda(model):
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


@pytest.fixture
def fake_cuda(monkeypatch):
    """Fake tensors only; Detectron2's padding, which looks at values, is left out."""
    stack = staticmethod(lambda images, *args: ImageList(torch.stack(images), [x.shape[-2:] for x in images]))
    monkeypatch.setattr(ImageList, "from_tensors", stack)
    with FakeTensorMode():
        with pytest.raises(Exception, match="device"):
            torch.zeros(2, device="cuda") + torch.zeros(2)
        yield torch.device("cuda", 0)


class GivenMatches:
    """Computes the costs on the device, and matches the first two kernels and instances of every image."""

    def __init__(self, matcher):
        self.matcher = matcher

    def match(self, stages, classes, masks):
        for images in stages:
            for arguments in zip(images, classes, masks):
                assert {c.device.type for c in self.matcher.cost_terms(*arguments).values()} == {"cuda"}
        index = torch.arange(2, device="cuda")
        return [[(index, index)] * len(images) for images in stages]


@pytest.mark.parametrize("task", TASKS)
def test_everything_runs_on_the_model_s_device(task, fake_cuda):
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = tiny_model(task)
    move_to_fake_cuda(model)
    model.criterion.matcher = GivenMatches(model.criterion.matcher)
    images = model.preprocess_image([{"image": torch.zeros(3, 64, 96, dtype=torch.uint8)}] * 2)
    features = model.backbone(images.tensor)
    state = model.sem_seg_head(features)
    stages = model.cascade(state)
    auxiliary = None if model.auxiliary_head is None else model.auxiliary_head(features)

    masks, labels = torch.zeros(2, 16, 24, device="cuda"), torch.zeros(64, 96, dtype=torch.int64, device="cuda")
    classes = torch.zeros(2, dtype=torch.int64, device="cuda")
    stuff = 2 if task == "panoptic" else 0
    target = Targets(classes, masks, 3 + classes[:stuff], masks[:stuff], labels)
    losses = model.criterion(state, stages, [target, target], auxiliary)
    assert set(losses) == expected_keys(task)
    assert {x.device for x in losses.values()} == {fake_cuda}

    geometry = ImageGeometry((64, 96), (60, 90), (30, 45))
    assert mask_probabilities(stages[-1].mask_logits[0], geometry).device == fake_cuda
    if task == "panoptic":
        model.outputs = ("sem_seg",)
    if task != "instance":
        result = model.postprocess(state, stages, [{"height": 30, "width": 45}] * 2, images)
        assert result[1]["sem_seg"].device == fake_cuda


def test_instance_targets_move_to_the_model_s_device(fake_cuda, monkeypatch):
    x = {"image": torch.zeros(3, 64, 96, dtype=torch.uint8)}
    masks = BitMasks(torch.zeros(2, 64, 96, dtype=torch.bool))
    x["instances"] = Instances((64, 96), gt_classes=torch.zeros(2, dtype=torch.int64), gt_masks=masks)
    bank = KernelBank.for_task("instance", num_kernels=6, num_things=3, num_stuff=0)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: 0)  # the range check looks at values
    targets = build_targets(x, (64, 96), (16, 24), bank, IGNORE, torch.zeros(1, device="cuda"))
    assert {t.device for t in targets if t is not None} == {fake_cuda}


# Errors


@pytest.mark.parametrize(
    "task, changes, message",
    [
        ("panoptic", {"sem_seg": torch.zeros(32, 64)}, r"0\.jpg: 'sem_seg' is \(32, 64\), but its image is \(64, 64\)"),
        ("panoptic", {"sem_seg": torch.full((64, 64), 5)}, r"0\.jpg: 'sem_seg' has labels \[5\]; expected 0 \.\. 4"),
        ("semantic", {"sem_seg": torch.full((64, 64), -1)}, r"0\.jpg: 'sem_seg' has labels \[-1\].*IGNORE_VALUE"),
        ("semantic", {"sem_seg": None}, r"0\.jpg has no 'sem_seg'.*MODEL\.KNET\.TASK"),
        ("instance", {"instances": None}, r"0\.jpg has no 'instances'.*INPUT\.DATASET_MAPPER_NAME"),
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


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("panoptic", {"MODEL.KNET.NUM_STAGES": 0}, "MODEL.KNET.NUM_STAGES = 0"),
        ("instance", {"MODEL.KNET.NUM_STAGES": 0}, "MODEL.KNET.NUM_STAGES = 0"),
        ("semantic", {"MODEL.KNET.NUM_STAGES": -1}, "MODEL.KNET.NUM_STAGES = -1"),
        ("instance", {"MODEL.KNET.NUM_KERNELS": 0}, "MODEL.KNET.NUM_KERNELS = 0"),
        ("panoptic", {"MODEL.KNET.TASK": "panoramic"}, "MODEL.KNET.TASK = 'panoramic'"),
        ("instance", {"MODEL.KNET.TEST.OUTPUTS": ["instances", "sem_seg"]}, r"TEST.OUTPUTS has \['sem_seg'\]"),
        ("panoptic", {"MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p9"]}, r"IN_FEATURES has \['p9'\].*p5"),
        ("panoptic", {"MODEL.KNET.NUM_THING_CLASSES": 0}, "NUM_THING_CLASSES"),
    ],
)
def test_bad_configs_are_errors_that_name_the_key(task, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_model(task, options)


# Every node of the model's config changes something

NODES = {
    "TASK": ("panoptic", "instance"),
    "NUM_KERNELS": ("panoptic", 7),
    "NUM_THING_CLASSES": ("panoptic", 4),
    "NUM_STUFF_CLASSES": ("panoptic", 3),
    "THING_CATEGORY_IDS": ("panoptic", [10, 11, 12]),
    "STUFF_CATEGORY_IDS": ("panoptic", [90, 91]),
    "NUM_STAGES": ("panoptic", 2),
    "POSITION_ENCODING": ("panoptic", "none"),
    "DROPOUT": ("semantic", 0.5),
    "UPDATE_HEAD.FEATURE_DIM": ("panoptic", 16),
    "UPDATE_HEAD.NUM_HEADS": ("panoptic", 2),
    "UPDATE_HEAD.FFN_DIM": ("panoptic", 40),
    "UPDATE_HEAD.KERNEL_UPDATE": ("panoptic", False),
    "UPDATE_HEAD.KERNEL_INTERACTION": ("panoptic", False),
    "UPDATE_HEAD.INIT": ("semantic", "default"),
    "LOSS.CLASS_WEIGHT": ("panoptic", 1.0),
    "LOSS.MASK_WEIGHT": ("panoptic", 2.0),
    "LOSS.DICE_WEIGHT": ("panoptic", 1.0),
    "LOSS.RANK_WEIGHT": ("panoptic", 0.2),
    "LOSS.DENSE_WEIGHT": ("panoptic", 0.5),
    "LOSS.AUXILIARY_WEIGHT": ("semantic", 0.8),
    "LOSS.FOCAL_ALPHA": ("panoptic", 0.5),
    "LOSS.FOCAL_GAMMA": ("panoptic", 1.0),
    "MATCHER.CLASS_WEIGHT": ("panoptic", 0.0),
    "MATCHER.MASK_WEIGHT": ("panoptic", 100.0),
    "MATCHER.DICE_WEIGHT": ("panoptic", 0.0),
    "AUXILIARY_HEAD.IN_FEATURE": ("semantic", "res4"),
    "AUXILIARY_HEAD.CONV_DIM": ("semantic", 16),
    "TEST.OUTPUTS": ("panoptic", ["sem_seg"]),
    "TEST.SCORE_THRESHOLD": ("instance", 0.9),
    "TEST.THING_SCORE_THRESHOLD": ("panoptic", 0.99),
    "TEST.OVERLAP_THRESHOLD": ("panoptic", 0.0),
}


def node_names(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from node_names(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def as_plain(x):
    """Results and losses as lists and numbers, which can be compared."""
    if isinstance(x, torch.Tensor):
        return x.tolist()
    if isinstance(x, Instances):
        return {key: as_plain(value) for key, value in x.get_fields().items()}
    if isinstance(x, dict):
        return {key: as_plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [as_plain(value) for value in x]
    return x.tensor.tolist() if hasattr(x, "tensor") else x


@torch.no_grad()
def behaviour(task, options):
    """Losses on one batch, and results on its images, of a model from the same seed."""
    model = tiny_model(task, options, seed=5)
    if task != "semantic":
        spread_scores(model, seed=5)
    batch = [make_example((64, 64), 3, seed=i) for i in range(2)]
    torch.manual_seed(0)
    return as_plain(model(batch)), as_plain(model.eval()([{"image": x["image"]} for x in batch]))


@pytest.fixture(scope="module")
def default_behaviour():
    return {task: behaviour(task, {}) for task in TASKS}


def test_all_nodes_are_tested():
    assert set(node_names(tiny_config("panoptic").MODEL.KNET)) == set(NODES)


def test_behaviour_is_a_function_of_config_and_seed(default_behaviour):
    assert behaviour("panoptic", {}) == default_behaviour["panoptic"]


@pytest.mark.parametrize("node", NODES)
def test_every_node_changes_something(node, default_behaviour):
    task, value = NODES[node]
    losses, results = behaviour(task, {f"MODEL.KNET.{node}": value})
    default_losses, default_results = default_behaviour[task]
    trains = not node.startswith("TEST.") and not node.endswith("CATEGORY_IDS")
    tests = not node.startswith(("LOSS.", "MATCHER.", "AUXILIARY_HEAD.")) and node != "DROPOUT"
    assert (losses != default_losses) == trains
    if tests:
        assert results != default_results
    elif not node.startswith("AUXILIARY_HEAD."):
        assert results == default_results


def test_all_arguments_come_from_the_config():
    cfg = tiny_config("panoptic")
    arguments = KNet.from_config(cfg)
    assert set(arguments) == set(inspect.signature(KNet.__init__.__wrapped__).parameters) - {"self"}
    model = KNet(**arguments)  # usable without a config
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in KNet(cfg).parameters())
