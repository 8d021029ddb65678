"""Train Detectron2's Mask R-CNN with the backbone, data, batches, augmentation and optimiser of a config.

    python -m checks.mask_rcnn --config-file configs/shapes/instance.yaml output/mask_rcnn --opts SOLVER.MAX_ITER 320

With --cascade it is Cascade Mask R-CNN, and with a panoptic config Panoptic FPN. It is a yardstick: the program prints
the processor seconds of the training, without evaluations, and the AP or PQ, to be compared with those of
tools/compare_training.py. Weights, augmentations, frozen layers and the average of the weights are the config's, too.
What it says of K-Net's head has no effect; the heads have the pyramid's number of channels, and anchors for the sizes
of the config's images. Give the best of several SOLVER.BASE_LR.
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
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from checks.peers import mask_rcnn_config
from knet_d2.checkpoint import Checkpointer
from knet_d2.data import build_mapper
from knet_d2.data.copy_paste import Mapper, with_copy_paste
from knet_d2.engine.optimizer import build_gradient_clipper, build_lr_scheduler, build_optimizer
from knet_d2.engine.output_dir import resolve_seed
from knet_d2.evaluation import build_evaluators
from knet_d2.programs import run
from knet_d2.programs.arguments import add_opts

METRICS = ("AP", "AP50", "PQ", "PQ_th", "PQ_st")


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
    seconds, start = 0.0, time.process_time()
    with EventStorage() as storage:
        for iteration, batch in zip(range(1, cfg.SOLVER.MAX_ITER + 1), train_loader(cfg)):
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            clip_gradients([p for p in model.parameters() if p.grad is not None])
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
            storage.step()
            if iteration % (cfg.TEST.EVAL_PERIOD or cfg.SOLVER.MAX_ITER) == 0 or iteration == cfg.SOLVER.MAX_ITER:
                seconds += time.process_time() - start
                results = evaluate(cfg, average.module)
                print(json.dumps({"iteration": iteration, "cpu_seconds": round(seconds), **results}), flush=True)
                start = time.process_time()


if __name__ == "__main__":
    sys.exit(run(main, get_parser()))
