"""Training and prediction: setup, trainer, optimiser, hooks, writers, predictor."""

from .predictor import Predictor
from .setup import choose_device, load_config, merge_config, setup
from .trainer import Trainer

__all__ = ["Predictor", "Trainer", "choose_device", "load_config", "merge_config", "setup"]
