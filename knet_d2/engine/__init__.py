"""Training runs: trainer, training step, optimiser, hooks, writers and processes."""

from ..config.merging import choose_device, load_config, merge_config
from ..inference.detectron2_predictor import Predictor
from .output_dir import setup
from .trainer import Trainer

__all__ = ["Predictor", "Trainer", "choose_device", "load_config", "merge_config", "setup"]
