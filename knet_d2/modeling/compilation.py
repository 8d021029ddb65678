"""torch.compile for the part of the model whose shapes are static (MODEL.COMPILE).

This part is :meth:`KNet.static_network`: backbone and neck, static kernels, cascade. Its shapes depend on the batch's
size alone. Outside are what depends on values or on the number of objects: targets, matching, losses, post-processing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from .layers import half_type
from .structures import NetworkOutput

logger = logging.getLogger(__name__)

# Each compilation takes minutes for a large model, and torch.compile gives up after 8 of them
MOST_COMPILED = 8


class CompiledNetwork:
    """Compiles the static network for each size of a batch, up to MOST_COMPILED; other sizes are computed as usual.

    Sizes are never dynamic: a compiled graph with symbolic sizes can round them otherwise than eager PyTorch.
    """

    def __init__(self) -> None:
        self._variants: set[tuple] = set()
        self._is_limit_told = False

    def __call__(self, model: Any, images: torch.Tensor, image_sizes: torch.Tensor | None, *more: Any) -> NetworkOutput:
        """The static network of a KNet. Arguments as for :meth:`KNet.network`."""
        # All that makes torch.compile compile again
        modes = model.training, torch.is_grad_enabled(), image_sizes is None, *(x is None for x in more)
        variant = (images.shape, images.dtype, half_type(images), *modes)
        if variant not in self._variants and len(self._variants) == MOST_COMPILED:
            if not self._is_limit_told:
                logger.warning(
                    "MODEL.COMPILE: %d sizes of batches are compiled, which is the limit. Other sizes, such as %s, are "
                    "computed without compilation. Use fewer sizes (INPUT.MIN_SIZE_TRAIN, INPUT.CROP), or set "
                    "MODEL.COMPILE to False.",
                    *(MOST_COMPILED, list(images.shape)),
                )
            self._is_limit_told = True
            return model.static_network(images, image_sizes, *more)
        self._variants.add(variant)
        return compiled_function()(model, images, image_sizes, *more)


@functools.cache
def compiled_function() -> Callable[..., NetworkOutput]:
    """The compiled static network, which takes the model as an argument, so that a copy of a model runs its own."""
    return torch.compile(lambda model, *images: model.static_network(*images), dynamic=False)
