"""An exponential moving average of the weights (SOLVER.EMA_DECAY), which is evaluated and saved as the model."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import ConfigError


class WeightAverage(HookBase):
    """Averages the weights after every step; buffers, as batch norm's statistics, are those of the model.

    A checkpoint's "model" is the average, so that whoever loads it needs to know nothing of this; the weights that
    the optimiser goes on with are in this hook's state.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: is trained; not wrapped for distributed training.
            decay: part of the average that stays in a step.
        """
        self._model = model
        # Not the buffers: PyTorch's average of integers rounds down.
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)
        self._resumed = False

    @property
    def averaged_model(self) -> nn.Module:
        """A model of the same kind with the averaged weights."""
        return self._averaged.module

    def start(self) -> None:
        """Let the training begin with the weights that were loaded into the average, unless a run is resumed."""
        if not self._resumed:
            self._model.load_state_dict(self.averaged_model.state_dict())

    def after_step(self) -> None:
        self._averaged.update_parameters(self._model)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self._model.state_dict(), "num_steps": int(self._averaged.n_averaged)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._model.load_state_dict(state_dict["model"])
        self._averaged.n_averaged.fill_(state_dict["num_steps"])
        self._resumed = True


def build_weight_average(cfg: CfgNode, model: nn.Module) -> WeightAverage | None:
    """The hook that SOLVER.EMA_DECAY asks for; None where it is 0."""
    decay = cfg.SOLVER.EMA_DECAY
    if not 0 <= decay < 1:
        raise ConfigError(f"SOLVER.EMA_DECAY = {decay}: use 0 (no average) or a number below 1, as 0.999.")
    return WeightAverage(model, decay) if decay else None
