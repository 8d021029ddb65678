"""The evaluators of instance, panoptic and semantic segmentation, and the table that selects them."""

from .build import best_metric, build_evaluators
from .instance import InstanceEvaluator
from .panoptic import PanopticEvaluator
from .semantic import SemanticEvaluator

__all__ = ["InstanceEvaluator", "PanopticEvaluator", "SemanticEvaluator", "best_metric", "build_evaluators"]
