"""The yardstick of checks.mask_rcnn: what its Mask R-CNN shares with a K-Net of the same config."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from checks.mask_rcnn import for_detectron2, predictions
from checks.peers import mask_rcnn_config
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


def test_panoptic_configs_have_a_semantic_head_of_the_stuff_and_one_class_for_all_things():
    cfg = mask_rcnn_config("configs/shapes/panoptic_modern.yaml", OPTS)
    model = build_model(cfg)
    assert type(model).__name__ == "PanopticFPN"
    assert model.sem_seg_head.predictor.out_channels == 1 + cfg.MODEL.KNET.NUM_STUFF_CLASSES > 1
    assert model.combine_stuff_area_thresh == pytest.approx(62.9, abs=0.1)  # of 128 x 128 pixels


def test_ground_truth_has_boxes_around_the_masks_and_one_label_for_things():
    masks = torch.zeros(3, 8, 10, dtype=torch.bool)
    masks[0, 1:4, 2:9], masks[1, 7, 0] = True, True  # the third is empty
    instances = Instances((8, 10), gt_masks=BitMasks(masks), gt_classes=torch.tensor([0, 3, 1]))
    example = {"instances": instances, "sem_seg": torch.tensor([[0, 3], [4, 6], [255, 5]])}
    found = for_detectron2(lambda record: example, num_things=4, ignore_value=255)({})
    assert found["instances"].gt_boxes.tensor.tolist() == [[2, 1, 9, 4], [0, 7, 1, 8]]
    assert found["instances"].gt_classes.tolist() == [0, 3]
    assert found["sem_seg"].tolist() == [[0, 0], [1, 3], [255, 2]]


def test_stuff_segments_get_the_ids_of_the_data_set():
    segments = [{"isthing": True, "category_id": 1}, {"isthing": False, "category_id": 1}]
    segments.append({"isthing": False, "category_id": 3})
    outputs = predictions(lambda batch: [{"panoptic_seg": (None, segments)}], stuff_ids=[7, 8, 9])([{}])
    assert [x["category_id"] for x in outputs[0]["panoptic_seg"][1]] == [1, 7, 9]
