"""The config of the model: every option has an effect, and impossible values are errors."""

import inspect

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from helpers import TASKS, make_example, spread_scores, tiny_config, tiny_model

from knet_d2.errors import ConfigError
from knet_d2.modeling.meta_arch import KNet

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
    "UPDATE_HEAD.RESIDUAL_MASKS": ("panoptic", True),
    "UPDATE_HEAD.POOLED_CLASSES": ("panoptic", True),
    "UPDATE_HEAD.INIT": ("semantic", "default"),
    "LOSS.CLASS_WEIGHT": ("panoptic", 1.0),
    "LOSS.MASK_WEIGHT": ("panoptic", 2.0),
    "LOSS.DICE_WEIGHT": ("panoptic", 1.0),
    "LOSS.RANK_WEIGHT": ("panoptic", 0.2),
    "LOSS.DENSE_WEIGHT": ("panoptic", 0.5),
    "LOSS.AUXILIARY_WEIGHT": ("semantic", 0.8),
    "LOSS.NUM_POINTS": ("panoptic", 40),
    "LOSS.QUALITY_EXPONENT": ("panoptic", 1.0),
    "LOSS.LOVASZ_WEIGHT": ("semantic", 1.0),
    "LOSS.LABEL_WEIGHTS": ("semantic", [1.0, 2.0, 0.0, 1.0, 0.5]),
    "LOSS.FOCAL_ALPHA": ("panoptic", 0.5),
    "LOSS.FOCAL_GAMMA": ("panoptic", 1.0),
    "DENOISING.NUM_KERNELS": ("panoptic", 9),
    "ONE_TO_MANY.NUM_KERNELS": ("panoptic", 9),
    "MATCHER.CLASS_WEIGHT": ("panoptic", 0.0),
    "MATCHER.MASK_WEIGHT": ("panoptic", 100.0),
    "MATCHER.DICE_WEIGHT": ("panoptic", 0.0),
    "AUXILIARY_HEAD.IN_FEATURE": ("semantic", "res4"),
    "AUXILIARY_HEAD.CONV_DIM": ("semantic", 16),
    "TEST.OUTPUTS": ("panoptic", ["sem_seg"]),
    "TEST.STAGE": ("panoptic", 2),
    "TEST.SCORE_THRESHOLD": ("instance", 0.9),
    "TEST.THING_SCORE_THRESHOLD": ("panoptic", 0.99),
    "TEST.OVERLAP_THRESHOLD": ("panoptic", 0.0),
    "TEST.SCORE_EXPONENT": ("instance", 2.0),
    "TEST.MASK_NMS": ("instance", 0.3),
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
    """Losses on one batch, and results on its images, of models from a few seeds."""
    losses, results = [], []
    for seed in range(4):  # not every model has, for instance, a segment that one threshold decides on
        model = tiny_model(task, options, seed=seed)
        if task != "semantic":
            spread_scores(model, seed=seed)
        batch = [make_example((64, 64), 3, seed=i) for i in range(2)]
        torch.manual_seed(0)
        losses.append(as_plain(model(batch)))
        results.append(as_plain(model.eval()([{"image": x["image"]} for x in batch])))
    return losses, results


@pytest.fixture(scope="module")
def default_behaviour():
    return {task: behaviour(task, {}) for task in TASKS}


def test_all_nodes_are_tested():
    # Tested with processes, image kernels, mask networks, training kernels and recomputation
    elsewhere = {"LOSS.GLOBAL_NORMALIZERS", "LOSS.CENTER_WEIGHT", "DENOISING.NOISE", "DENOISING.WEIGHT"}
    elsewhere |= {"ONE_TO_MANY.REPEATS", "ONE_TO_MANY.WEIGHT", "MASK_NETWORK_WIDTH", "CHECKPOINT"}
    names = {name for name in node_names(tiny_config("panoptic").MODEL.KNET) if not name.startswith("VIDEO.")}
    assert names == set(NODES) | elsewhere  # those of videos: test_video_model.py


def test_behaviour_is_a_function_of_config_and_seed(default_behaviour):
    assert behaviour("panoptic", {}) == default_behaviour["panoptic"]


@pytest.mark.parametrize("node", NODES)
def test_every_node_changes_something(node, default_behaviour):
    task, value = NODES[node]
    losses, results = behaviour(task, {f"MODEL.KNET.{node}": value})
    default_losses, default_results = default_behaviour[task]
    trains = not node.startswith("TEST.") and not node.endswith("CATEGORY_IDS")
    in_training = ("LOSS.", "MATCHER.", "AUXILIARY_HEAD.", "DENOISING.", "ONE_TO_MANY.")
    tests = not node.startswith(in_training) and node != "DROPOUT"
    assert (losses != default_losses) == trains
    if tests:
        assert results != default_results
    elif not node.startswith("AUXILIARY_HEAD."):
        assert results == default_results


@pytest.mark.parametrize("task, expected", [("instance", 0.0), ("panoptic", 0.1), ("semantic", 1.0)])
def test_the_weight_of_the_cross_entropy_over_kernels_follows_the_task(task, expected):
    name = "label_map" if task == "semantic" else "rank"
    assert tiny_model(task).criterion.weights[name] == expected
    assert tiny_model(task, {"MODEL.KNET.LOSS.RANK_WEIGHT": 0.3}).criterion.weights[name] == 0.3


def test_all_arguments_come_from_the_config():
    cfg = tiny_config("panoptic")
    arguments = KNet.from_config(cfg)
    assert set(arguments) == set(inspect.signature(KNet.__init__.__wrapped__).parameters) - {"self"}
    model = KNet(**arguments)  # usable without a config
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in KNet(cfg).parameters())


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("panoptic", {"MODEL.KNET.NUM_STAGES": 0}, "MODEL.KNET.NUM_STAGES = 0"),
        ("instance", {"MODEL.KNET.NUM_STAGES": 0}, "MODEL.KNET.NUM_STAGES = 0"),
        ("semantic", {"MODEL.KNET.NUM_STAGES": -1}, "MODEL.KNET.NUM_STAGES = -1"),
        ("panoptic", {"MODEL.KNET.NUM_STAGES": 101}, "MODEL.KNET.NUM_STAGES = 101"),
        ("instance", {"MODEL.KNET.NUM_KERNELS": 0}, "MODEL.KNET.NUM_KERNELS = 0"),
        ("panoptic", {"MODEL.KNET.TEST.STAGE": 4}, "MODEL.KNET.TEST.STAGE = 4"),
        ("panoptic", {"MODEL.KNET.TASK": "panoramic"}, "MODEL.KNET.TASK = 'panoramic'"),
        ("instance", {"MODEL.KNET.TEST.OUTPUTS": ["instances", "sem_seg"]}, r"TEST.OUTPUTS has \['sem_seg'\]"),
        ("panoptic", {"MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p9"]}, r"IN_FEATURES has \['p9'\].*p5"),
        ("panoptic", {"MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead"}, "'SemSegFPNHead'.*'SemanticFPNKernelHead'"),
        ("semantic", {"MODEL.SEM_SEG_HEAD.NAME": "FCNHead"}, "SEM_SEG_HEAD.NAME = 'FCNHead'.*'FCNKernelHead'"),
        ("panoptic", {"MODEL.SEM_SEG_HEAD.NAME": "ImageKernelHead"}, "CENTER_WEIGHT = 0.0.*'ImageKernelHead'.*above 0"),
        ("panoptic", {"MODEL.KNET.LOSS.CENTER_WEIGHT": 1.0}, "CENTER_WEIGHT = 1.0.*'SemanticFPNKernelHead': use 0"),
        ("panoptic", {"MODEL.KNET.NUM_THING_CLASSES": 0}, "NUM_THING_CLASSES"),
        ("instance", {"MODEL.KNET.TEST.MASK_NMS": 0.0}, "MODEL.KNET.TEST.MASK_NMS = 0.0: .* up to 1"),
        ("instance", {"MODEL.KNET.TEST.SCORE_EXPONENT": -1.0}, "MODEL.KNET.TEST.SCORE_EXPONENT = -1.0: use 0"),
        ("instance", {"TEST.DETECTIONS_PER_IMAGE": -1}, "TEST.DETECTIONS_PER_IMAGE = -1"),
        ("instance", {"MODEL.KNET.TEST.SCORE_THRESHOLD": 30.0}, "TEST.SCORE_THRESHOLD = 30.0: use 0 to 1"),
        (
            "panoptic",
            {"MODEL.KNET.TEST.THING_SCORE_THRESHOLD": float("nan")},
            "SCORE_THRESHOLD = nan: use 0 to 1",
        ),
        ("panoptic", {"MODEL.KNET.TEST.OVERLAP_THRESHOLD": -0.1}, "OVERLAP_THRESHOLD = -0.1: use 0 to 1"),
    ],
)
def test_bad_configs_are_errors_that_name_the_key(task, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_model(task, options)
