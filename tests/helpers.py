"""Tiny models, batches and slow references that several tests share."""

import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from knet_d2.config import add_knet_config

IGNORE = 255

# What makes any config's model small; 32 channels are the fewest that GroupNorm takes
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.NUM_HEADS": [1, 2, 2, 4],
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.KNET.NUM_KERNELS": 6,
    "MODEL.KNET.UPDATE_HEAD.FEATURE_DIM": 32,
    "MODEL.KNET.UPDATE_HEAD.NUM_HEADS": 4,
    "MODEL.KNET.UPDATE_HEAD.FFN_DIM": 48,
    "MODEL.KNET.AUXILIARY_HEAD.CONV_DIM": 8,
    "DATASETS.TRAIN": (),
    "DATASETS.TEST": (),
}
# Numbers of thing and stuff classes
CLASSES = {"instance": (3, 0), "panoptic": (3, 2), "semantic": (0, 5)}
RESNET = {
    "MODEL.META_ARCHITECTURE": "KNet",
    "MODEL.BACKBONE.NAME": "build_knet_resnet_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
}
DETECTION = {
    "MODEL.SEM_SEG_HEAD.NAME": "SemanticFPNKernelHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 8,
}
SEMANTIC = {
    "MODEL.BACKBONE.NAME": "build_knet_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4"],
    "MODEL.SEM_SEG_HEAD.NAME": "FCNKernelHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res4"],
    "MODEL.SEM_SEG_HEAD.NORM": "BN",
    "MODEL.KNET.LOSS.AUXILIARY_WEIGHT": 0.4,
    "MODEL.KNET.AUXILIARY_HEAD.IN_FEATURE": "res3",
}
TASKS = {
    "instance": DETECTION,
    "panoptic": DETECTION,
    "semantic": SEMANTIC,
}
# Added to the options of an instance or panoptic model
IMAGE_KERNELS = {
    "MODEL.SEM_SEG_HEAD.NAME": "ImageKernelHead",
    "MODEL.KNET.LOSS.CENTER_WEIGHT": 1.0,
    "MODEL.KNET.MASK_NETWORK_WIDTH": 3,
}


def neck(name):
    """Options of a small neck."""
    return {"MODEL.NECK.NAME": name, "MODEL.NECK.NUM_LAYERS": 1, "MODEL.NECK.FFN_DIM": 48}


def set_options(cfg, options):
    """Options by their keys into a config, in place; returns the config."""
    cfg.merge_from_list([item for pair in options.items() for item in pair])
    return cfg


def small(task):
    """Options that make a config's model small, and give it 5 classes (instance: 3)."""
    things, stuff = CLASSES[task]
    return {**SMALL, "MODEL.KNET.NUM_THING_CLASSES": things, "MODEL.KNET.NUM_STUFF_CLASSES": stuff}


def tiny_config(task, options=None):
    """A config of a K-Net with about 200,000 parameters: 3 thing and 2 stuff (semantic: 5) classes, 6 kernels."""
    cfg = get_cfg()
    add_knet_config(cfg)
    return set_options(cfg, {**small(task), **RESNET, **TASKS[task], "MODEL.KNET.TASK": task, **(options or {})})


def tiny_model(task, options=None, seed=0):
    torch.manual_seed(seed)
    return build_model(tiny_config(task, options))


def matcher_options():
    """Arguments of the matcher in the default config."""
    knet = tiny_config("panoptic").MODEL.KNET
    weights = {name.lower(): value for name, value in knet.MATCHER.items()}
    return {**weights, "focal_alpha": knet.LOSS.FOCAL_ALPHA, "focal_gamma": knet.LOSS.FOCAL_GAMMA}


def spread_scores(model, seed=0):
    """Replace the initial scores of about 0.01 by scores in all of (0, 1), so that results are not empty."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for stage in model.cascade.stages:
            classifier = stage.class_branch[-1]
            for parameter in (classifier.weight, classifier.bias):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def make_example(size, num_instances, *, seed=0, num_things=3, num_classes=5):
    """A training example with rectangular instances and a label map in which one column is void."""
    generator = torch.Generator().manual_seed(1000 * seed + num_instances)
    height, width = size
    labels = torch.full(size, num_classes - 1)
    labels[:, : width // 2] = num_classes - 2
    labels[:, -3:] = IGNORE
    classes = torch.randint(num_things, (num_instances,), generator=generator)
    masks = torch.zeros(num_instances, *size, dtype=torch.bool)
    for mask, label in zip(masks, classes.tolist()):
        y, x = (int(torch.randint(n // 2, (), generator=generator)) for n in size)
        mask[y : y + height // 3, x : x + width // 3] = True
        labels[mask] = label
    instances = Instances(size, gt_classes=classes, gt_masks=BitMasks(masks))
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    return {"image": image, "file_name": f"{seed}.jpg", "instances": instances, "sem_seg": labels}


def make_batch(counts, seed=0):
    """Examples of different sizes with these numbers of instances."""
    sizes = [(64, 64), (50, 75), (96, 40)]
    return [make_example(size, count, seed=seed + i) for i, (size, count) in enumerate(zip(sizes, counts))]


def expected_losses(task, num_stages=3):
    """Names of all losses of a tiny model."""
    stages = range(num_stages + 1)
    if task == "semantic":
        return {f"loss_rank_s{i}" for i in stages} | {"loss_auxiliary"}
    terms = ("mask", "dice") if task == "instance" else ("mask", "dice", "rank")
    keys = {f"loss_{term}_s{i}" for term in terms for i in stages}
    return keys | {f"loss_class_s{i}" for i in stages[1:]} | {"loss_dense_s0"}


def slow_bilinear(x, size):
    """Bilinear resizing with align_corners false of a [h, w] array, pixel by pixel."""
    x = np.asarray(x, dtype=np.float64)

    def source(i, length, out_length):
        position = min(max((i + 0.5) * length / out_length - 0.5, 0), length - 1)
        low = math.floor(position)
        return low, min(low + 1, length - 1), position - low

    result = np.zeros(size)
    for i in range(size[0]):
        y0, y1, v = source(i, x.shape[0], size[0])
        for j in range(size[1]):
            x0, x1, u = source(j, x.shape[1], size[1])
            upper, lower = (1 - u) * x[y0, x0] + u * x[y0, x1], (1 - u) * x[y1, x0] + u * x[y1, x1]
            result[i, j] = (1 - v) * upper + v * lower
    return result


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


# Fake CUDA tensors, which need no GPU

CUDA = torch.device("cuda", 0)


def move_to_fake_cuda(model):
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


class Transfers(TorchDispatchMode):
    """Collects copies between devices as (from, to, non_blocking), and calls that make the CPU wait for a device."""

    # What returns a number, or a tensor whose shape depends on values
    WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2"}

    def __init__(self, device=CUDA):
        super().__init__()
        self.device, self.copies, self.waits = device, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
        if any(x.device == self.device for x in tensors) and (name in self.WAITING or by_mask):
            self.waits.append(name)
        result = func(*args, **kwargs)
        if name == "copy_" and args[0].device != args[1].device:
            self.copies.append((args[1].device.type, args[0].device.type, any(args[2:])))
        elif isinstance(result, torch.Tensor) and len(tensors) == 1 and tensors[0].device != result.device:
            self.copies.append((tensors[0].device.type, result.device.type, kwargs.get("non_blocking", False)))
        return result


def fake_cuda_works():
    """Older torch calls the CUDA driver also for fake tensors."""
    try:
        with FakeTensorMode():
            return torch.zeros(2, device="cuda")[None].device == CUDA
    except RuntimeError:
        return False


needs_fake_cuda = pytest.mark.skipif(not fake_cuda_works(), reason="this torch has no fake CUDA tensors without a GPU")
