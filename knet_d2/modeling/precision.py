"""Where mixed precision ends: sums over thousands of pixels overflow float16 and round too much in bfloat16."""

import contextlib
from contextlib import AbstractContextManager

import torch


def full_precision(x: torch.Tensor | None) -> torch.Tensor | None:
    """x in float32 if it is of a half type; float64 stays float64, None stays None."""
    if x is None or x.dtype not in (torch.float16, torch.bfloat16):
        return x
    return x.float()


def no_autocast(x: torch.Tensor) -> AbstractContextManager:
    """A context in which operations on x's device keep the type of their inputs."""
    if not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
