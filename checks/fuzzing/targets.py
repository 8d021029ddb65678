"""What is damaged and how it is read: one class for each kind of file.

Each prepares valid files in a folder; ``make`` writes a damaged one, ``use`` reads it as the programs do and tells when
what it holds came to the model or the loader.
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
