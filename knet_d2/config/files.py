"""Finds the config files, in a checkout and in an installed wheel."""

from pathlib import Path

from ..errors import ConfigError


def config_folder() -> Path:
    """Return the folder of the config files: in the package of a wheel, beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def get_config_file(name: str) -> str:
    """Full path of one of our config files.

    Args:
        name: its path below ``configs``, for example ``shapes/panoptic.yaml``.
    """
    path = config_folder() / name
    if not path.is_file():
        raise ConfigError(f"{name}: no such config file in {config_folder()}")
    return str(path)
