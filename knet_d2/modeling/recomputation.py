"""Activation checkpointing (Chen et al., arXiv:1604.06174): MODEL.KNET.CHECKPOINT and MODEL.TIMM.CHECKPOINT.

A checkpointed module keeps its inputs and its output for the backward pass, which computes what lies between them again.
Only batch norms can tell: their running statistics must count each batch once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from .layers import BATCH_NORMS

# Branches of a head, and convolutions with their norm and activation outside of branches
HEAD_PARTS = (nn.Sequential, Conv2d)


def checkpoint_activations(head: nn.Module, stages: Iterable[nn.Module]) -> None:
    """Let the parts of a head, and stages, keep no activations in training.

    Parameters and their names, losses and gradients stay the same. The parts are as large as they can be without adding
    to the peak, which is that of the losses: a level of the semantic FPN, a branch, a stage.
    """
    for module in (*_outermost(head, HEAD_PARTS), *stages):
        vars(module)["forward"] = functools.partial(_forward, module)


def _outermost(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """The modules of some kinds within a module, without those that are part of another one of these kinds."""
    for child in module.children():
        if isinstance(child, kinds):
            yield child
        else:
            yield from _outermost(child, kinds)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(module).forward, module)
    if not (module.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():  # what a compiled graph computes again changes no statistics
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=functools.partial(_contexts, module), **kwargs)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Those in which torch.utils.checkpoint computes the first and the second time."""
    return contextlib.nullcontext(), _kept_statistics(module)


@contextlib.contextmanager
def _kept_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms leave their running statistics as they are."""
    norms = [x for x in module.modules() if isinstance(x, BATCH_NORMS)]
    kept = [(x.momentum, x.num_batches_tracked) for x in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, count


class FirstComputation:
    """The context of a network's forward pass, where others decide what the backward pass computes again.

    Outside of it, the network's batch norms leave their running statistics as they are.
    """

    def __init__(self, network: nn.Module):
        self._is_running = False
        for norm in network.modules():
            if isinstance(norm, BATCH_NORMS):
                vars(norm)["forward"] = functools.partial(self._normalise, norm)

    def __enter__(self) -> None:
        self._is_running = True

    def __exit__(self, *error: object) -> None:
        self._is_running = False

    def _normalise(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with contextlib.nullcontext() if self._is_running else _kept_statistics(norm):
            return type(norm).forward(norm, x)
