"""Functions that several tests of weights files share."""

import os
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def randomised(model, seed=5):
    """Give every entry of the state dict different random values."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.2 + 0.1)
    return model


def assert_same_state(a, b, names=None):
    names = [x for x in a if not x.endswith("num_batches_tracked")] if names is None else names
    assert names and all(torch.equal(a[name], b[name]) for name in names)


def save(tmp_path, content, name="file.pth"):
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


class Exploit:
    target = ""

    def __reduce__(self):
        return os.mkdir, (Exploit.target,)
