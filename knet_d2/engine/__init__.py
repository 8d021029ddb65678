"""Training and prediction: setup, trainer, optimiser, hooks, writers, predictor."""

from ..config.merging import choose_device, load_config, merge_config, setup
from ..inference.default_predictor import Predictor
from .trainer import Trainer

__all__ = ["Predictor", "Trainer", "choose_device", "load_config", "merge_config", "setup"]
