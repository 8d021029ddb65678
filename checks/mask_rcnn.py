"""Train Detectron2's Mask R-CNN with the backbone, data, batches, augmentation and optimiser of a config.

    python -m checks.mask_rcnn --config-file configs/shapes/instance.yaml output/mask_rcnn --opts SOLVER.MAX_ITER 320

With --cascade it is Cascade Mask R-CNN, and with a panoptic config Panoptic FPN. It is a yardstick: the program prints
the processor seconds of the training steps and the AP or PQ, to be compared with those of train_net.py. Weights,
augmentations, frozen layers and the average of the weights are the config's, too. What it says of K-Net's head has no
effect; the heads have the pyramid's number of channels, and anchors for the sizes of the config's images. Give the best
of several SOLVER.BASE_LR.
"""

import argparse
import json
import os
import sys
import time

import torch
from detectron2.data import DatasetCatalog
from detectron2.data.build import build_detection_test_loader, build_detection_train_loader
from detectron2.data.detection_utils import filter_empty_instances
from detectron2.data.samplers import TrainingSampler
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from knet_d2.checkpoint import Checkpointer
from knet_d2.config.merging import load_config
from knet_d2.data import build_mapper, resolve_classes
from knet_d2.data.copy_paste import Mapper, with_copy_paste
from knet_d2.engine.optimizer import build_gradient_clipper, build_lr_scheduler, build_optimizer
from knet_d2.engine.output_dir import resolve_seed
from knet_d2.evaluation import build_evaluators
from knet_d2.programs import run
from knet_d2.programs.arguments import add_opts
from knet_d2.tasks import get_task

# Sides of the anchors of the levels p2 to p6, as shares of an image's shorter side
ANCHORS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
LEVELS = ["p2", "p3", "p4", "p5"]
# Smallest stuff region of Panoptic FPN, as a share of the image: Detectron2's 4,096 pixels of 800 x 1333
STUFF_AREA = 4096 / (800 * 1333)
METRICS = ("AP", "AP50", "PQ", "PQ_th", "PQ_st")
# Proposals that the heads learn from, of an image of 128 x 128 pixels with few objects (Detectron2: 512 at 800 x 1333)
PROPOSALS = 128


@BACKBONE_REGISTRY.register()
def build_mask_rcnn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Detectron2's pyramid with the level p6 that the proposals need, on the network of the config's pyramid."""
    network = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.PYRAMID)(cfg, input_shape).bottom_up
    fpn = cfg.MODEL.FPN
    return FPN(network, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM, LastLevelMaxPool(), fpn.FUSE_TYPE)


def mask_rcnn_config(config_file: str, opts: list[str], cascade: bool = False):
    """The config with Mask R-CNN as model; with "cascade" its boxes are improved in three steps."""
    cfg = load_config(config_file, opts)
    cfg.defrost()
    resolve_classes(cfg)
    model, channels = cfg.MODEL, cfg.MODEL.FPN.OUT_CHANNELS
    is_panoptic = get_task(cfg).name == "panoptic"
    model.META_ARCHITECTURE, model.MASK_ON = "PanopticFPN" if is_panoptic else "GeneralizedRCNN", True
    model.BACKBONE.PYRAMID, model.BACKBONE.NAME = model.BACKBONE.NAME, "build_mask_rcnn_backbone"
    model.PROPOSAL_GENERATOR.NAME, model.RPN.IN_FEATURES = "RPN", [*LEVELS, "p6"]
    model.ANCHOR_GENERATOR.SIZES = [[share * min(cfg.INPUT.MIN_SIZE_TRAIN)] for share in ANCHORS]
    model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TRAIN = 2000, 1000, 1000
    model.ROI_HEADS.NAME, model.ROI_HEADS.IN_FEATURES = "CascadeROIHeads" if cascade else "StandardROIHeads", LEVELS
    model.ROI_HEADS.NUM_CLASSES = model.KNET.NUM_THING_CLASSES
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = PROPOSALS
    box, mask = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    box.CLS_AGNOSTIC_BBOX_REG = cascade
    box.NAME, box.NUM_FC, box.FC_DIM, box.POOLER_RESOLUTION = "FastRCNNConvFCHead", 2, 4 * channels, 7
    mask.NAME, mask.NUM_CONV, mask.CONV_DIM, mask.POOLER_RESOLUTION = "MaskRCNNConvUpsampleHead", 4, channels, 14
    semantic = model.SEM_SEG_HEAD
    semantic.NAME, semantic.IN_FEATURES, semantic.COMMON_STRIDE = "SemSegFPNHead", LEVELS, 4
    semantic.NUM_CLASSES, semantic.LOSS_WEIGHT = 1 + model.KNET.NUM_STUFF_CLASSES, 0.5  # all things are one class
    model.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = STUFF_AREA * cfg.INPUT.MIN_SIZE_TEST**2
    return cfg


def for_detectron2(mapper: Mapper, num_things: int, ignore_value: int) -> Mapper:
    """A mapper whose instances have boxes, and whose label maps have the class 0 for all things."""

    def mapped(record: dict) -> dict:
        example = mapper(record)
        instances = example["instances"]
        instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        example["instances"] = filter_empty_instances(instances)
        if "sem_seg" in example:
            labels = example["sem_seg"]
            stuff = (labels - num_things + 1).clamp(min=0)
            example["sem_seg"] = torch.where(labels == ignore_value, ignore_value, stuff)
        return example

    return mapped


def train_loader(cfg):
    """Batches of the training images that have objects, with the config's augmentations."""
    mapper = build_mapper(cfg, is_train=True)
    records = [x for name in cfg.DATASETS.TRAIN for x in DatasetCatalog.get(name)]
    records = [x for x in records if any(c < cfg.MODEL.KNET.NUM_THING_CLASSES for c in mapper.annotated_classes(x))]
    mapper = with_copy_paste(cfg, mapper, records)
    mapper = for_detectron2(mapper, cfg.MODEL.KNET.NUM_THING_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    sampler = TrainingSampler(len(records), seed=cfg.SEED)
    return build_detection_train_loader(
        records, mapper=mapper, sampler=sampler, total_batch_size=cfg.SOLVER.IMS_PER_BATCH, num_workers=0
    )


def predictions(model, stuff_ids: list[int]):
    """The model as a function, whose stuff segments have the data set's ids instead of the labels 1, 2, ..."""

    def predict(batch: list[dict]) -> list[dict]:
        outputs = model(batch)
        for _, segments in (x["panoptic_seg"] for x in outputs if "panoptic_seg" in x):
            for segment in segments:
                if not segment["isthing"]:
                    segment["category_id"] = stuff_ids[segment["category_id"] - 1]
        return outputs

    return predict


def evaluate(cfg, model) -> dict:
    """Metrics on the first validation set."""
    name = cfg.DATASETS.TEST[0]
    evaluator = DatasetEvaluators(build_evaluators(cfg, name, cfg.OUTPUT_DIR))
    loader = build_detection_test_loader(cfg, name, mapper=build_mapper(cfg, is_train=False), num_workers=0)
    model.eval()
    results = inference_on_dataset(predictions(model, cfg.MODEL.KNET.STUFF_CATEGORY_IDS), loader, evaluator)
    return {kind: {key: round(x[key], 1) for key in METRICS if key in x} for kind, x in results.items()}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="instance or panoptic, with a pyramid")
    parser.add_argument("output", help="folder of the results")
    parser.add_argument("--cascade", action="store_true", help="Cascade Mask R-CNN")
    add_opts(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    os.makedirs(args.output, exist_ok=True)
    cfg = mask_rcnn_config(args.config_file, [*args.opts, "OUTPUT_DIR", args.output], args.cascade)
    cfg.SEED = resolve_seed(cfg)
    DatasetCatalog.get(cfg.DATASETS.TEST[0])  # writes a generated set, whose JSON the evaluator reads
    seed_all_rng(cfg.SEED)
    model = build_model(cfg)
    Checkpointer(model, partial=True).load(cfg.MODEL.WEIGHTS)
    model.train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.SOLVER.EMA_DECAY), use_buffers=True)
    clip_gradients = build_gradient_clipper(cfg)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    seconds = 0.0
    with EventStorage() as storage:
        for iteration, batch in zip(range(1, cfg.SOLVER.MAX_ITER + 1), train_loader(cfg)):
            start = time.process_time()
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            clip_gradients([p for p in model.parameters() if p.grad is not None])
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
            storage.step()
            seconds += time.process_time() - start
            if iteration % (cfg.TEST.EVAL_PERIOD or cfg.SOLVER.MAX_ITER) == 0 or iteration == cfg.SOLVER.MAX_ITER:
                results = evaluate(cfg, average.module)
                print(json.dumps({"iteration": iteration, "cpu_seconds": round(seconds), **results}), flush=True)


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
