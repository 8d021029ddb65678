"""The configs of the published models: all there, with their schedules and sizes; they train and predict; ablations."""

import re
from pathlib import Path

import pytest
import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
from checks.configs import train_and_predict, zoo_config_files
from checks.references.cases import zoo_config
from knet_d2.config import add_knet_config

# Config -> parameters of the official model, or of the paper's where none was published
PARAMETERS = {
    "coco/panoptic/knet_r50_fpn_1x.yaml": 37_536_852,
    "coco/panoptic/knet_r50_fpn_3x.yaml": 37_536_852,
    "coco/panoptic/knet_r101_fpn_3x.yaml": 56_528_980,
    "coco/panoptic/knet_r101_dcn_fpn_3x.yaml": 57_815_152,
    "coco/panoptic/knet_swin_l_fpn_3x.yaml": 208_781_224,
    "coco/instance/knet_r50_fpn_1x.yaml": 37_482_368,
    "coco/instance/knet_r50_fpn_3x.yaml": 37_482_368,
    "coco/instance/knet_r50_fpn_3x_n256.yaml": 37_522_304,
    "coco/instance/knet_r101_fpn_3x.yaml": 56_474_496,
    "coco/instance/knet_r101_fpn_3x_n256.yaml": 56_514_432,
    "coco/instance/knet_r101_dcn_fpn_3x.yaml": 57_760_668,
    "ade20k/semantic/knet_fcn_r50_d8_80k.yaml": 62_810_508,
    "ade20k/semantic/knet_pspnet_r50_d8_80k.yaml": 62_288_268,
    "ade20k/semantic/knet_deeplabv3_r50_d8_80k.yaml": 81_425_804,
    "ade20k/semantic/knet_upernet_r50_80k.yaml": 45_660_300,
    "ade20k/semantic/knet_upernet_swin_t_80k.yaml": 43_632_614,
    "ade20k/semantic/knet_upernet_swin_l_80k.yaml": 214_722_752,
    "ade20k/semantic/knet_upernet_swin_l_640_80k.yaml": 214_722_752,
}
DETECTION = {
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "SOLVER.BASE_LR": 1e-4,
    "SOLVER.BACKBONE_MULTIPLIER": 0.25,
    "SOLVER.WEIGHT_DECAY": 0.05,
    "SOLVER.WEIGHT_DECAY_NORM": 0.05,
}
SCHEDULE_1X = {
    **DETECTION,
    "SOLVER.MAX_ITER": 12 * 7329,
    "SOLVER.STEPS": (8 * 7329, 11 * 7329),
    "INPUT.MIN_SIZE_TRAIN": (800,),
}
SCHEDULE_3X = {
    **DETECTION,
    "SOLVER.MAX_ITER": 36 * 7329,
    "SOLVER.STEPS": (27 * 7329, 33 * 7329),
    "INPUT.MIN_SIZE_TRAIN": (640, 800),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
}
SEMANTIC = {
    "SOLVER.BASE_LR": 1e-4,
    "SOLVER.BACKBONE_MULTIPLIER": 1.0,
    "SOLVER.WEIGHT_DECAY": 5e-4,
    "SOLVER.WEIGHT_DECAY_NORM": 5e-4,
    "SOLVER.MAX_ITER": 80000,
    "SOLVER.STEPS": (60000, 72000),
    "INPUT.MIN_SIZE_TRAIN": (256, 1024),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
    "INPUT.MAX_SIZE_TRAIN": 4096,
    "INPUT.MIN_SIZE_TEST": 512,
    "INPUT.MAX_SIZE_TEST": 2048,
    "INPUT.CROP.SIZE": [512, 512],
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 0.75,
    "MODEL.BACKBONE.FREEZE_AT": 0,
}
SEMANTIC_SWIN = {**SEMANTIC, "SOLVER.BASE_LR": 6e-5, "SOLVER.WEIGHT_DECAY_NORM": 0.0}
SETTINGS = {
    "coco/panoptic/knet_r50_fpn_1x.yaml": SCHEDULE_1X,
    "coco/instance/knet_r50_fpn_1x.yaml": SCHEDULE_1X,
    "coco/instance/knet_r101_fpn_3x.yaml": {**SCHEDULE_3X, "MODEL.BACKBONE.FREEZE_AT": 2},
    "coco/instance/knet_r50_fpn_3x_n256.yaml": {**SCHEDULE_3X, "TEST.DETECTIONS_PER_IMAGE": 256},
    "coco/panoptic/knet_r101_dcn_fpn_3x.yaml": SCHEDULE_3X,
    "coco/panoptic/knet_swin_l_fpn_3x.yaml": {
        **SCHEDULE_3X,
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.SWIN.DROP_PATH_RATE": 0.2,
        "TEST.DETECTIONS_PER_IMAGE": 100,
    },
    "ade20k/semantic/knet_fcn_r50_d8_80k.yaml": SEMANTIC,
    "ade20k/semantic/knet_upernet_r50_80k.yaml": SEMANTIC,
    "ade20k/semantic/knet_upernet_swin_t_80k.yaml": {**SEMANTIC_SWIN, "MODEL.SWIN.DROP_PATH_RATE": 0.3},
    "ade20k/semantic/knet_upernet_swin_l_640_80k.yaml": {
        **SEMANTIC_SWIN,
        "INPUT.MIN_SIZE_TRAIN": (320, 1280),
        "INPUT.MIN_SIZE_TEST": 640,
        "INPUT.CROP.SIZE": [640, 640],
        "MODEL.SWIN.DROP_PATH_RATE": 0.4,
    },
}
WEIGHTS = {
    "r50_fpn": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    "r101": "detectron2://ImageNetPretrained/torchvision/R-101.pkl",
    "swin_t": "/swin_tiny_patch4_window7_224.pth",
    "swin_l": "/swin_large_patch4_window7_224_22k.pth",
    "ade20k": "/resnet50_v1c-2cccc1ad.pth",
}


def num_parameters(path, options=()):
    cfg = zoo_config(path, "meta")
    cfg.merge_from_list(list(options))
    with torch.device("meta"):
        model = build_model(cfg)
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_zoo_is_complete():
    assert set(zoo_config_files()) == set(PARAMETERS)


@pytest.mark.parametrize("path", PARAMETERS)
def test_number_of_parameters(path):
    assert num_parameters(path) == PARAMETERS[path]


def documented(path):
    """Parameters in millions and GFLOPs of a config in MODEL_ZOO.md."""
    lines = (ROOT / "MODEL_ZOO.md").read_text().splitlines()
    row = next(line for line in lines if f"(configs/{path})" in line)
    return re.search(r"\| (\d+\.\d\d) \| (\d+\.\d) \| [^|]*\|$", row).groups()


@pytest.mark.parametrize("path", PARAMETERS)
def test_documented_number_of_parameters(path):
    assert documented(path)[0] == f"{PARAMETERS[path] / 1e6:.2f}"


def deform_conv_flops(x, weight, *args, out_shape, **kwargs):
    """Of torchvision's deformable convolution, which PyTorch's counter does not know; two for a multiplication."""
    return 2 * torch.Size(weight).numel() * torch.Size(out_shape).numel() // out_shape[1]


@pytest.mark.parametrize(
    "path, size",
    [
        ("coco/instance/knet_r50_fpn_3x_n256.yaml", (800, 1216)),
        ("coco/panoptic/knet_r101_dcn_fpn_3x.yaml", (800, 1216)),
        ("ade20k/semantic/knet_deeplabv3_r50_d8_80k.yaml", (512, 512)),
        ("ade20k/semantic/knet_upernet_swin_l_640_80k.yaml", (640, 640)),
    ],
)
def test_documented_flops(path, size):
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: deform_conv_flops})
    with torch.device("meta"):
        model = build_model(zoo_config(path, "meta")).eval().requires_grad_(False)
        with counter:
            model.cascade(model.sem_seg_head(model.backbone(torch.empty(1, 3, *size))))
    assert documented(path)[1] == f"{counter.get_total_flops() / 2e9:.1f}"


@pytest.mark.parametrize("path", SETTINGS)
def test_schedule(path):
    cfg = zoo_config(path)
    assert cfg.SOLVER.OPTIMIZER == "ADAMW" and cfg.SOLVER.IMS_PER_BATCH == 16
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR) == (1000, 0.001)
    for key, value in SETTINGS[path].items():
        node = cfg
        for part in key.split("."):
            node = node[part]
        assert node == value, key


@pytest.mark.parametrize("path", PARAMETERS)
def test_pretrained_backbone(path):
    cfg = get_cfg()
    add_knet_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / path))
    kind = next(kind for kind in WEIGHTS if kind in path)
    assert cfg.MODEL.WEIGHTS.endswith(WEIGHTS[kind])


def test_one_step_and_one_prediction():
    """At full width; ``python -m checks.configs`` does it for all, test_architectures.py for all at small widths."""
    torch.manual_seed(0)
    outcome = train_and_predict(zoo_config("coco/instance/knet_r50_fpn_3x_n256.yaml"))
    assert all(0 <= loss < float("inf") for loss in outcome["losses"].values())
    # Residual branches that start at 0 let no gradient through in the first step
    assert outcome["changed"] > 0.75 * outcome["trained"]
    instances = outcome["result"]["instances"]
    assert len(instances) == 256 and instances.pred_masks.shape[1:] == (48, 72)


# ---------------------------------------------------------------- the paper's ablations, as overrides

INSTANCE = "coco/instance/knet_r50_fpn_1x.yaml"
FCN = "ade20k/semantic/knet_fcn_r50_d8_80k.yaml"
STAGE = 6_187_248 // 3  # of the instance model
DIM = 256


@pytest.mark.parametrize(
    "override, difference",
    [
        # two layers of 256 x 512, three of 256 x 256 with a norm each and two more norms become one layer of 256 x 256
        (
            ["MODEL.KNET.UPDATE_HEAD.KERNEL_UPDATE", False],
            3 * ((DIM**2 + DIM) - (3 * (DIM**2 + 3 * DIM) + 2 * (2 * DIM**2 + 2 * DIM) + 4 * DIM)),
        ),
        # attention (three inputs, one output), two norms, a hidden layer of 2048
        (
            ["MODEL.KNET.UPDATE_HEAD.KERNEL_INTERACTION", False],
            -3 * (4 * (DIM**2 + DIM) + 4 * DIM + 2 * DIM * 2048 + 2048 + DIM),
        ),
        (["MODEL.KNET.POSITION_ENCODING", "none"], 0),
        (["MODEL.KNET.POSITION_ENCODING", "coordinates"], 2 * 9 * DIM),
        *((["MODEL.KNET.NUM_STAGES", stages], (stages - 3) * STAGE) for stages in (1, 2, 4, 5, 7)),
        *((["MODEL.KNET.NUM_KERNELS", kernels], (kernels - 100) * DIM) for kernels in (50, 64, 128, 256)),
    ],
    ids=str,
)
def test_ablations_have_the_parameters_that_they_should(override, difference):
    assert num_parameters(INSTANCE, override) - PARAMETERS[INSTANCE] == difference


def test_semantic_stages():
    counts = [num_parameters(FCN, ["MODEL.KNET.NUM_STAGES", stages]) for stages in range(8)]
    assert counts[3] == PARAMETERS[FCN]
    assert len({b - a for a, b in zip(counts, counts[1:])}) == 1 and counts[1] > counts[0]
