"""Finds the config files, in a checkout and in an installed wheel."""

import os
from pathlib import Path

from ..errors import ConfigError


def config_folder() -> Path:
    """Return the folder of the config files: in the package of a wheel, beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def find_config_file(path: str) -> str:
    """A path; one of our config files where no file is there and it begins as in a checkout, with ``configs/``.

    Raises:
        ConfigError: there is no such file.
    """
    if os.path.isfile(path):
        return path
    folder, _, name = path.partition("/")
    if folder != "configs" or not (config_folder() / name).is_file():
        raise ConfigError(
            f"{path}: there is no such config file. Those of knet_d2 are in {config_folder()} and have names as in "
            "a checkout, such as configs/shapes/instance.yaml."
        )
    return str(config_folder() / name)


def get_config_file(name: str) -> str:
    """Full path of one of our config files.

    Args:
        name: its path below ``configs``, for example ``shapes/panoptic.yaml``.
    """
    path = config_folder() / name
    if not path.is_file():
        raise ConfigError(f"{name}: no such config file in {config_folder()}")
    return str(path)
