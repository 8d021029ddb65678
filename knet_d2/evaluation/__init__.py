"""The evaluators of instance, panoptic and semantic segmentation, and the table that selects them."""

from .build import Evaluators, best_metric, build_evaluators
from .instance import InstanceEvaluator
from .panoptic import PanopticEvaluator
from .report import write_report
from .semantic import SemanticEvaluator

__all__ = [
    "Evaluators",
    "InstanceEvaluator",
    "PanopticEvaluator",
    "SemanticEvaluator",
    "best_metric",
    "build_evaluators",
    "write_report",
]
