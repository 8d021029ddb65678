"""The table of fuzzing targets, one class for each kind of file.

A target creates valid files in a folder. ``make`` writes a damaged file. ``use`` reads it like the programs do, and
calls ``reached`` when the content has reached the model or the loader.
"""

from .configs import Configs
from .data import Annotations, Images, PanopticPngs
from .weights import Weights

TARGETS = {
    "annotations": Annotations,
    "panoptic": PanopticPngs,
    "images": Images,
    "weights": Weights,
    "configs": Configs,
}
