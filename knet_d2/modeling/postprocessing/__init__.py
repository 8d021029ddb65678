"""From the last stage's logits to instances, a panoptic map or semantic scores.

:mod:`.processor` is the door: one object that makes the results of an image. :mod:`.rules` has the rules for them.
What the rules need of every pixel comes from :mod:`.cells` on a CPU and from :mod:`.dense` on accelerators and in
exported graphs; both have the same functions.
"""

from .processor import ImageLogits, PostProcessor, ResultOptions, as_result
from .resize import ImageGeometry, mask_probabilities

__all__ = ["ImageGeometry", "ImageLogits", "PostProcessor", "ResultOptions", "as_result", "mask_probabilities"]
