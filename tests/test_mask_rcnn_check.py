"""The yardstick of checks.mask_rcnn: what its Mask R-CNN shares with a K-Net of the same config."""

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from checks.mask_rcnn import mask_rcnn_config, with_boxes
from knet_d2.config.merging import load_config

CONFIG = "configs/shapes/instance_modern.yaml"
OPTS = ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "320"]


def test_the_backbone_and_schedule_are_the_configs_own():
    knet, mask_rcnn = load_config(CONFIG, OPTS), mask_rcnn_config(CONFIG, OPTS)
    assert mask_rcnn.SOLVER == knet.SOLVER and mask_rcnn.INPUT == knet.INPUT
    ours, theirs = build_model(knet).backbone, build_model(mask_rcnn).backbone
    shapes = [{name: x.shape for name, x in net.bottom_up.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 100


def test_anchors_and_classes_follow_the_config():
    cfg = mask_rcnn_config(CONFIG, OPTS)
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[8.0], [16.0], [32.0], [64.0], [128.0]]  # images of 128 pixels
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 4
    assert set(build_model(cfg).backbone.output_shape()) == {"p2", "p3", "p4", "p5", "p6"}


def test_cascade_has_three_boxes_for_an_object_that_do_not_depend_on_its_class():
    heads = build_model(mask_rcnn_config(CONFIG, OPTS, cascade=True)).roi_heads
    assert [x.bbox_pred.out_features for x in heads.box_predictor] == [4, 4, 4]
    assert [x.cls_score.out_features for x in heads.box_predictor] == [5, 5, 5]


def test_boxes_are_those_of_the_masks():
    masks = torch.zeros(2, 8, 10, dtype=torch.bool)
    masks[0, 1:4, 2:9], masks[1, 7, 0] = True, True
    example = {"instances": Instances((8, 10), gt_masks=BitMasks(masks), gt_classes=torch.tensor([0, 3]))}
    found = with_boxes(lambda record: example)({})["instances"]
    assert found.gt_boxes.tensor.tolist() == [[2, 1, 9, 4], [0, 7, 1, 8]]
