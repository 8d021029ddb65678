"""The models of Detectron2 that checks.mask_rcnn trains beside K-Net: Mask R-CNN, Cascade Mask R-CNN, Panoptic FPN."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from knet_d2.config.merging import load_config
from knet_d2.data import resolve_classes
from knet_d2.tasks import get_task

# Sides of the anchors of the levels p2 to p6, as shares of an image's shorter side
ANCHORS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
LEVELS = ["p2", "p3", "p4", "p5"]
# Smallest stuff region of Panoptic FPN, as a share of the image: Detectron2's 4,096 pixels of 800 x 1333
STUFF_AREA = 4096 / (800 * 1333)
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
