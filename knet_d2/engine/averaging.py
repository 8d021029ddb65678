"""The exponential moving average of the weights (SOLVER.EMA_DECAY), which is evaluated and saved as the model."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import ConfigError


class WeightAverage(HookBase):
    """Averages the weights after every step. Buffers, such as the statistics of batch norm, are not averaged.

    The average is stored as "model" in a checkpoint, so it loads like any other model. The weights that the
    optimiser updates are stored in the state of this hook.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: model that is trained, without the wrapper for distributed training.
            decay: weight of the old average in each step, 0 to 1: average = decay * average + (1 - decay) * weights.
        """
        self._model = model
        # use_buffers=True would also average integer buffers, which rounds them down.
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)
        self._resumed = False

    @property
    def averaged_model(self) -> nn.Module:
        """A model of the same architecture with the averaged weights."""
        return self._averaged.module

    def start(self) -> None:
        """Copy the loaded weights, which the checkpointer put into the average, to the trained model.

        In a resumed run both are loaded already.
        """
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
    """Build the hook for SOLVER.EMA_DECAY; None if it is 0."""
    decay = cfg.SOLVER.EMA_DECAY
    if not 0 <= decay < 1:
        raise ConfigError(f"SOLVER.EMA_DECAY = {decay}: use 0 (no average) or a number below 1, such as 0.999.")
    return WeightAverage(model, decay) if decay else None
