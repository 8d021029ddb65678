"""Activation checkpointing (Chen et al., arXiv:1604.06174): MODEL.KNET.CHECKPOINT and MODEL.TIMM.CHECKPOINT.

A checkpointed module keeps its inputs and its output, and the backward pass computes what lies between them again. Only
batch norms could tell: their running statistics must count each batch once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from .layers import BATCH_NORMS

# Branches of a head, and convolutions with their norm and activation outside of branches
HEAD_PARTS = (nn.Sequential, Conv2d)


class FirstComputation:
    """The context of a module's forward pass, of which the backward pass computes parts again.

    Outside of it, the module's batch norms leave their running statistics as they are.
    """

    def __init__(self, module: nn.Module):
        self._is_running = False
        for norm in module.modules():
            if isinstance(norm, BATCH_NORMS):
                vars(norm)["forward"] = functools.partial(self._normalise, norm)

    def __enter__(self) -> None:
        self._is_running = True

    def __exit__(self, *error: object) -> None:
        self._is_running = False

    def _normalise(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        forward = type(norm).forward
        if self._is_running:
            return forward(norm, x)
        momentum, count = norm.momentum, norm.num_batches_tracked
        try:
            norm.momentum, norm.num_batches_tracked = 0.0, None
            return forward(norm, x)
        finally:
            norm.momentum, norm.num_batches_tracked = momentum, count


def checkpoint_activations(head: nn.Module, stages: Iterable[nn.Module]) -> None:
    """Let the parts of a head, and stages, keep no activations in training.

    Parameters and their names, losses and gradients stay the same. A part is a level of the semantic FPN, a branch or a
    stage: the backward pass holds the activations of one of them at a time.
    """
    for module in (*_outermost(head, HEAD_PARTS), *stages):
        vars(module)["forward"] = functools.partial(_forward, module, FirstComputation(module))


def _outermost(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """The modules of some kinds within a module, without those that are part of another one of these kinds."""
    for child in module.children():
        if isinstance(child, kinds):
            yield child
        else:
            yield from _outermost(child, kinds)


def _forward(module: nn.Module, first_computation: FirstComputation, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(module).forward, module)
    with first_computation:
        if module.training and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)
