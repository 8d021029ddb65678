"""Options of Detectron2 that K-Net ignores, and the options that replace them.

tests/test_options.py records which options training, evaluation and prediction read, and compares them with this list.
"""

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode, get_cfg

from .merging import with_lists

logger = logging.getLogger(__name__)

# Key, or a prefix of keys that ends in "." -> the option to set instead ("": none). The longest matching entry holds.
UNREAD = {
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": "",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": "",
    "DATASETS.PROPOSAL_FILES_TEST": "",
    "DATASETS.PROPOSAL_FILES_TRAIN": "",
    "GLOBAL.": "",
    "MODEL.ANCHOR_GENERATOR.": "",
    "MODEL.KEYPOINT_ON": "MODEL.KNET.TASK",
    "MODEL.LOAD_PROPOSALS": "",
    "MODEL.MASK_ON": "MODEL.KNET.TASK",
    "MODEL.PANOPTIC_FPN.": "MODEL.KNET.TASK",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": "MODEL.KNET.TEST.THING_SCORE_THRESHOLD",
    "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": "MODEL.KNET.TEST.OVERLAP_THRESHOLD",
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": "MODEL.KNET.LOSS.CLASS_WEIGHT, MASK_WEIGHT and DICE_WEIGHT",
    "MODEL.PROPOSAL_GENERATOR.": "",
    "MODEL.RETINANET.": "",
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": "MODEL.KNET.LOSS.FOCAL_ALPHA",
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": "MODEL.KNET.LOSS.FOCAL_GAMMA",
    "MODEL.RETINANET.NUM_CLASSES": "MODEL.KNET.NUM_THING_CLASSES",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "MODEL.KNET.TEST.SCORE_THRESHOLD",
    "MODEL.ROI_BOX_CASCADE_HEAD.": "",
    "MODEL.ROI_BOX_HEAD.": "",
    "MODEL.ROI_HEADS.": "",
    "MODEL.ROI_HEADS.NUM_CLASSES": "MODEL.KNET.NUM_THING_CLASSES",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "MODEL.KNET.TEST.SCORE_THRESHOLD",
    "MODEL.ROI_KEYPOINT_HEAD.": "",
    "MODEL.ROI_MASK_HEAD.": "",
    "MODEL.RPN.": "",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "MODEL.KNET.NUM_KERNELS",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "MODEL.KNET.NUM_KERNELS",
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": "MODEL.KNET.LOSS.DENSE_WEIGHT",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "MODEL.KNET.NUM_STUFF_CLASSES",
    "TEST.KEYPOINT_OKS_SIGMAS": "",
    "VIS_PERIOD": "TEST.NUM_PICTURES",
}


def find_unread(key: str) -> str | None:
    """Return the entry of ``UNREAD`` for a key; None if K-Net reads the key."""
    fitting = [entry for entry in UNREAD if key == entry or (entry.endswith(".") and key.startswith(entry))]
    return max(fitting, key=len, default=None)


def warn_of_unread_options(cfg: CfgNode) -> None:
    """Log one warning that names the changed options that have no effect on a K-Net."""
    if cfg.MODEL.META_ARCHITECTURE != "KNet":
        return
    found = []
    for key in changed_leaves(cfg, get_cfg()):
        entry = find_unread(key)
        if entry is not None:
            found.append(f"{key} (use {UNREAD[entry]})" if UNREAD[entry] else key)
    if found:
        logger.warning(f"Options of Detectron2 that K-Net does not read are set: {', '.join(found)}.")


def changed_leaves(cfg: CfgNode, defaults: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yield the full keys of the options whose values in ``cfg`` differ from ``defaults``."""
    for key, value in defaults.items():
        if isinstance(value, CfgNode):
            yield from changed_leaves(cfg[key], value, f"{prefix}{key}.")
        elif with_lists(cfg[key]) != with_lists(value):
            yield prefix + key
