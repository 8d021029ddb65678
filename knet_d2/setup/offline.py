"""Installation on a machine without a network: a folder of wheels and sources that another machine downloads.

This file imports only the standard library, like :mod:`.install_detectron2`.
"""

import importlib.util
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from .dependencies import DEPENDENCIES
from .doctor import OK, judge, probe
from .install_detectron2 import (
    SDIST_NAME,
    SDIST_VERSION,
    InstallError,
    download_panopticapi,
    fetch_sdist,
    install_detectron2,
    install_panopticapi,
    run_pip,
)

# Registries have only the sources of these, which are pure Python; pip downloads only wheels for another machine.
SOURCES_ONLY = ("fvcore", "iopath", "antlr4-python3-runtime==4.9.*")
OPENCV = "opencv-python-headless"
# The oldest glibc in the name of a wheel, and older names of three of them
_OLDEST_GLIBC = 5
_LEGACY_TAGS = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
# Local version of the stand-ins, which is newer for pip than the same version without one
_THERE = "there"


class Target(NamedTuple):
    """The machine that will install the folder.

    Attributes:
        python: its Python version, such as "3.12"; None: that of this process.
        platforms: wheel platforms that it accepts, such as "manylinux_2_28_x86_64"; none: those of this machine.
        installed: {name in lower case with hyphens: version} of the packages that it has.
    """

    python: str | None = None
    platforms: Sequence[str] = ()
    installed: Mapping[str, str] = MappingProxyType({})


def normalized(name: str) -> str:
    """Return a package name as pip compares it: "PyYAML" -> "pyyaml", "hydra_core" -> "hydra-core"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_installed(text: str) -> dict[str, str]:
    """Read what a machine has.

    Args:
        text: a file written by ``python -m pip list --format=freeze``, or such lines separated by commas.

    Returns:
        {normalised name: version}.

    Raises:
        InstallError: a line is not NAME==VERSION.
    """
    path = Path(text)
    lines = path.read_text().splitlines() if path.is_file() else text.split(",")
    found = {}
    for line in filter(None, map(str.strip, lines)):
        match = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)", line)
        if match is None:
            raise InstallError(
                f"--missing-on: {line!r} is no NAME==VERSION. Give the file that this command writes on the other "
                "machine: python -m pip list --format=freeze > FILE"
            )
        found[normalized(match[1])] = match[2]
    return found


def expanded_platforms(platforms: Sequence[str]) -> list[str]:
    """Add the older platforms whose wheels also run: "manylinux_2_28_x86_64" accepts "manylinux2014_x86_64"."""
    expanded = []
    for platform in platforms:
        expanded.append(platform)
        match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform)
        for glibc in range(int(match[1]) if match else 0, _OLDEST_GLIBC - 1, -1):
            expanded.append(f"manylinux_2_{glibc}_{match[2]}")
            if glibc in _LEGACY_TAGS:
                expanded.append(f"{_LEGACY_TAGS[glibc]}_{match[2]}")
    return list(dict.fromkeys(expanded))


def write_stand_in(name: str, version: str, folder: Path) -> str:
    """Write an empty wheel for a package that the other machine has; returns the requirement that pip chooses it by.

    pip then takes the package for present in this version: it downloads neither the package nor its dependencies, and
    chooses versions of other packages that fit.
    """
    version = version if "+" in version else f"{version}+{_THERE}"
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return f"{name}=={version}"


def requirements_of(installed: Mapping[str, str], further: Sequence[str]) -> list[str]:
    """Return what pip has to download: the declared dependencies that are missing, OpenCV, and further ones."""
    wanted = [d.requirement for d in DEPENDENCIES if d.declared and normalized(d.distribution) not in installed]
    if not any(name.startswith("opencv-") for name in installed):
        wanted.append(OPENCV)
    return [*wanted, *further]


def download(folder: Path, target: Target, further: Sequence[str] = ()) -> str:
    """Download all that :func:`install_from` needs on another machine; returns a sentence on what was done.

    Args:
        folder: folder for the files; it is made if it is missing.
        target: the other machine.
        further: requirements beyond those of knet_d2, such as "onnx".
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--python-version", target.python] if target.python else []
    for platform in expanded_platforms(target.platforms):
        options += ["--platform", platform]
    with tempfile.TemporaryDirectory(prefix="knet_d2_") as temporary:
        work = Path(temporary)
        fetch_sdist(work).replace(folder / f"{SDIST_NAME}-{SDIST_VERSION}.tar.gz")
        download_panopticapi(folder)
        stand_ins, found = work / "stand_ins", work / "found"
        stand_ins.mkdir()
        pins = [write_stand_in(name, version, stand_ins) for name, version in target.installed.items()]
        (work / "constraints.txt").write_text("\n".join(pins))
        sources = [x for x in SOURCES_ONLY if normalized(x.partition("==")[0]) not in target.installed]
        if sources:
            run_pip(["wheel", "--quiet", "--no-deps", "--wheel-dir", str(found), *sources])
        found.mkdir(exist_ok=True)
        wanted = requirements_of(target.installed, further)
        if wanted:
            links = ["--find-links", str(stand_ins), "--find-links", str(found)]
            pinned = ["--constraint", str(work / "constraints.txt")]
            run_pip(["download", "--only-binary", ":all:", *options, *pinned, *links, "--dest", str(found), *wanted])
        names = {path.name for path in stand_ins.iterdir()}
        for path in found.iterdir():
            if path.name not in names:
                # A move across file systems, as /tmp often is one of its own
                (folder / path.name).write_bytes(path.read_bytes())
    files = list(folder.iterdir())
    size = sum(path.stat().st_size for path in files) / 2**20
    return (
        f"{folder}: {len(files)} files, {size:.0f} MiB. On the other machine: "
        f"python -m knet_d2.install_detectron2 --from {folder.name}"
    )


def missing_requirements() -> list[str]:
    """Return the requirements of the packages that the doctor finds missing, too old or broken here."""
    declared = [d for d in DEPENDENCIES if d.declared]
    bad = [d.requirement for d, result in zip(declared, probe(declared)) if judge(d, result).status != OK]
    return bad if importlib.util.find_spec("cv2") else [*bad, OPENCV]


def install_from(folder: Path, further: Sequence[str] = ()) -> list[str]:
    """Install Detectron2 and all dependencies that are missing here from a folder, without a network.

    Args:
        folder: written by :func:`download`.
        further: requirements beyond those of knet_d2, as for :func:`download`.

    Returns:
        Sentences on what was done.

    Raises:
        InstallError: the folder lacks something; nothing is looked up elsewhere.
    """
    sdist = folder / f"{SDIST_NAME}-{SDIST_VERSION}.tar.gz"
    if not sdist.is_file():
        raise InstallError(f"--from {folder}: no {sdist.name} in it. Make the folder with --download FOLDER.")
    offline = ["--no-index", "--find-links", str(folder)]
    wanted = [*missing_requirements(), *further]
    if wanted:
        run_pip(["install", *offline, *wanted])
    done = f"dependencies: installed {', '.join(wanted)}" if wanted else "dependencies: all are there"
    return [done, install_detectron2(sdist), install_panopticapi(offline)]
