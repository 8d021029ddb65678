"""Keeps the network output for one image, so that the results of every stage can be inspected."""

from collections.abc import Sequence
from typing import Any

import torch

from ..data.classes import ClassTable
from ..errors import ConfigError
from ..modeling.meta_arch import KNet
from ..results.outputs import main_prediction
from ..results.prediction import Prediction


class Trace:
    """The network output for one image: the static kernels and the S stages.

    Attributes:
        num_stages: S.
    """

    @torch.no_grad()
    def __init__(self, model: KNet, sample: dict[str, Any], classes: ClassTable, outputs: Sequence[str]):
        """
        Args:
            model: in evaluation mode.
            sample: one input of the model, with "height" and "width" of the result.
            outputs: the results that the model can give; the first one is the main one.
        """
        self._model, self._sample, self._classes, self._outputs = model, sample, classes, tuple(outputs)
        self._images = model.preprocess_image([sample])
        self._network_output = model.network(self._images.tensor, torch.tensor(self._images.image_sizes))
        self.num_stages = len(self._network_output.stages)

    @torch.no_grad()
    def prediction(self, confidence_threshold: float, *, stage: int = -1, output: str = "") -> Prediction:
        """Return the segments at one stage.

        Args:
            confidence_threshold: instances and thing segments with a lower score are left out.
            stage: 0 for the static kernels, before any update; 1 to S for a stage; -1 for the last stage.
            output: "instances", "panoptic_seg" or "sem_seg"; "" for the main one.

        Raises:
            ConfigError: there is no such stage, or the model has no such output.
        """
        if not -1 <= stage <= self.num_stages:
            raise ConfigError(f"stage = {stage}: this model has 0 (static kernels) to {self.num_stages}, or -1 (last).")
        if output and output not in self._outputs:
            raise ConfigError(f"output = {output!r}: this model gives {' and '.join(self._outputs)}.")
        model, sample = self._model, self._sample
        logits = model.image_logits(self._network_output, [sample], self._images, stage)
        options = model.postprocessor.options._replace(
            outputs=(output or self._outputs[0],),
            score_threshold=confidence_threshold,
            thing_score_threshold=confidence_threshold,
        )
        results = model.postprocessor(logits[0], options)
        return main_prediction(results, self._classes)
