"""Training: setup, trainer, optimiser, hooks, writers."""

from knet_d2.engine.setup import choose_device, load_config, merge_config, setup
from knet_d2.engine.trainer import Trainer

__all__ = ["Trainer", "choose_device", "load_config", "merge_config", "setup"]
