"""What may stand in the place of a weights file: a training run's folder, a model of the package, one of a hub."""

import os
from pathlib import Path

from .hub import PREFIX as HUB_PREFIX
from .hub import fetch_from_hub
from .resume import best_checkpoint

# Trained models that come with the package, each by its name without the ending
FOLDER = Path(__file__).resolve().parent.parent / "weights"


def packaged_names() -> list[str]:
    """The names, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def weights_file(address: str) -> str:
    """The file that an address stands for; the address itself if it is a file, or is read by Detectron2's PathManager.

    Args:
        address: folder of a training run, whose best weights are taken; name of a model that comes with the package;
            ``hf://user/name``; or a path, ``knet://...``, ``https://...``.

    Raises:
        CheckpointError: a folder without weights, or the hub does not give the file.
    """
    if address.startswith(HUB_PREFIX):
        return fetch_from_hub(address)
    if address in packaged_names():
        return str(FOLDER / f"{address}.safetensors")
    return best_checkpoint(address) if os.path.isdir(address) else address
