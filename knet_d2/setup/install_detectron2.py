"""Installs Detectron2 0.6 and panopticapi; :mod:`.install_program` is the program.

The registry has Detectron2's Python sources as an sdist that pip can't build. This program downloads the sdist, checks
its hash, applies substitutions for current versions of other packages, writes a pure Python wheel and installs it.
A Detectron2 that can be imported is not changed. The program can be interrupted and repeated at any time.
It imports only the standard library, because it runs before any other package is installed.
"""

import base64
import csv
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import KNetError
from .dependencies import DEPENDENCIES, DETECTRON2, PANOPTICAPI, TORCH_COMMAND, Dependency
from .doctor import probe

SDIST_NAME = "pb1-detectron2"
SDIST_VERSION = "0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
# Increase the number after "knet" when the substitutions change, so that older installations of ours are replaced.
WHEEL_VERSION = f"{SDIST_VERSION}+knet1"
DIST_INFO = f"detectron2-{WHEEL_VERSION}.dist-info"
# Lists the changed files, which the licence requires, and marks an installation as ours. It is the first file of the
# wheel, so that an interrupted installation has it, too.
CHANGES_FILE = "KNET_D2_CHANGES.txt"

PANOPTICAPI_REQUIREMENT = "panopticapi-lite==0.1.0"
PANOPTICAPI_SHA256 = "3d44beed48cd61d0c408b4cf8b5c4752b666567620f175b55f0445303911f37d"

# Tools that download the sdist: newer versions of pip refuse it because of a direct URL in one of its extras.
SDIST_TOOLS = ("pip==26.2", "setuptools")

# Folder in the sdist -> folder in the wheel, for packages that Detectron2's setup installs below detectron2/projects.
PROJECT_FOLDERS = {
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}


class InstallError(KNetError):
    """The installation can't continue; the message says what to do."""


class Substitution(NamedTuple):
    """Replace ``old``, which occurs exactly ``count`` times in ``file``, by ``new``."""

    file: str
    old: str
    new: str
    count: int = 1  # type: ignore[assignment]  # NamedTuple has a method of this name


def _tried(statement: str, otherwise: str) -> str:
    """Return code for an import that may fail."""
    return f"try:\n    {statement}except ImportError:\n    {otherwise}\n"


_IMPORT_C = "from detectron2 import _C\n"
_IMPORT_FAST_EVAL = "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
_IMPORT_API = "from .api import *\n"
_SCHEDULER = "torch.optim.lr_scheduler."
_CONFIG_FILE = (
    'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )'
)

SUBSTITUTIONS = tuple(
    Substitution(f"detectron2/{file}", *rest)
    for file, *rest in (
        # No compiled extension.
        ("layers/deform_conv.py", _IMPORT_C, _tried(_IMPORT_C, "_C = None")),
        ("layers/rotated_boxes.py", _IMPORT_C, _tried(_IMPORT_C, "_C = None")),
        ("layers/roi_align_rotated.py", _IMPORT_C, _tried(_IMPORT_C, "_C = None")),
        ("evaluation/coco_evaluation.py", _IMPORT_FAST_EVAL, _tried(_IMPORT_FAST_EVAL, "COCOeval_opt = COCOeval")),
        # torch has no caffe2 any more; without this, detectron2.utils.analysis can't be imported.
        ("export/__init__.py", _IMPORT_API, _tried(_IMPORT_API, "pass")),
        # Pillow 10 has removed this name.
        ("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
        # setuptools 82 has no pkg_resources.
        ("model_zoo/model_zoo.py", "import pkg_resources\n", ""),
        (
            "model_zoo/model_zoo.py",
            _CONFIG_FILE,
            'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)',
        ),
        # numpy 1.24 has removed these names.
        ("data/build.py", "np.int)", "int)"),
        ("data/build.py", "np.int\n", "int\n"),
        ("evaluation/sem_seg_evaluation.py", "np.int)", "int)", 2),
        ("evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5),
        ("data/datasets/pascal_voc.py", "np.str)", "str)"),
        ("structures/masks.py", "np.bool)", "bool)", 3),
        ("utils/visualizer.py", "np.bool)", "bool)", 3),
        ("utils/video_visualizer.py", "np.bool)", "bool)"),
        ("evaluation/pascal_voc_evaluation.py", "np.bool)", "bool)", 2),
        # random.sample takes no sets since Python 3.11.
        ("data/common.py", "sample(self._fallback_candidates, k=1)", "sample(list(self._fallback_candidates), k=1)"),
        # Schedulers have another base class since torch 2; without this, checkpoints do not contain their state.
        ("engine/hooks.py", f"{_SCHEDULER}_LRScheduler", f"{_SCHEDULER}LRScheduler", 2),
        # Allow several processes without a GPU.
        (
            "engine/launch.py",
            '    assert torch.cuda.is_available(), "cuda is not available. Please check your installation."\n',
            "    has_gpu = torch.cuda.is_available()\n",
        ),
        ("engine/launch.py", 'backend="NCCL"', 'backend="NCCL" if has_gpu else "GLOO"'),
        (
            "engine/launch.py",
            "    assert num_gpus_per_machine <= torch.cuda.device_count()\n    torch.cuda.set_device(local_rank)\n",
            "    if has_gpu:\n"
            "        assert num_gpus_per_machine <= torch.cuda.device_count()\n"
            "        torch.cuda.set_device(local_rank)\n",
        ),
        # Avoid warnings of torch 2.
        (
            "utils/comm.py",
            "    storage = torch.ByteStorage.from_buffer(buffer)\n"
            "    tensor = torch.ByteTensor(storage).to(device=device)\n",
            "    tensor = torch.frombuffer(bytearray(buffer), dtype=torch.uint8).to(device=device)\n",
        ),
        (
            "checkpoint/detection_checkpoint.py",
            "torch.load(f)",
            'torch.load(f, map_location="cpu", weights_only=True)',
        ),
        ("modeling/anchor_generator.py", "(shifts_y, shifts_x)", '(shifts_y, shifts_x, indexing="ij")'),
        ("engine/train_loop.py", "from torch.cuda.amp import Grad", "from torch.amp import Grad"),
        ("engine/train_loop.py", "        from torch.cuda.amp import autocast\n", ""),
        ("engine/train_loop.py", "with autocast():", 'with torch.autocast("cuda"):'),
    )
)


def read_sdist(path: Path, sha256: str) -> dict[str, bytes]:
    """Check the hash of an sdist, and read it into {path below its top folder: content}."""
    if not path.is_file():
        raise InstallError(f"{path}: no such file. Set --sdist to the file {SDIST_NAME}-{SDIST_VERSION}.tar.gz.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise InstallError(f"{path}: its sha256 is {found}, expected {sha256}. Download the file again.")
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                files[member.name.partition("/")[2]] = archive.extractfile(member).read()
    return files


def apply_substitutions(files: dict[str, bytes], substitutions: Sequence[Substitution]) -> dict[str, bytes]:
    """Return ``files`` with all substitutions applied.

    Raises:
        InstallError: a text to replace does not occur ``count`` times in its file.
    """
    files = dict(files)
    for file, old, new, count in substitutions:
        if file not in files:
            raise InstallError(f"{file}: Detectron2's sources lack this file, so {old!r} can't be replaced in it.")
        text = files[file].decode()
        if text.count(old) != count:
            raise InstallError(f"{file}: {old!r} occurs {text.count(old)} times, expected {count}.")
        files[file] = text.replace(old, new).encode()
    return files


def wheel_contents(files: dict[str, bytes], substitutions: Sequence[Substitution]) -> dict[str, bytes]:
    """Return {path in the wheel: content} of all files of the wheel, with its metadata but without RECORD."""
    changed = sorted({substitution.file for substitution in substitutions})
    notice = [f"Detectron2 {SDIST_VERSION} with these files changed by knet_d2.install_detectron2:", *changed, ""]
    contents = {f"detectron2/{CHANGES_FILE}": "\n".join(notice).encode()}
    for name, content in sorted(files.items()):
        for source, target in {"detectron2/": "detectron2/", **PROJECT_FOLDERS}.items():
            if name.startswith(source):
                contents[target + name.removeprefix(source)] = content
    metadata = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {WHEEL_VERSION}",
        "Summary: Detectron2 0.6 without its compiled extension, adapted to today's packages",
        "License: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.7",
        *(f"Requires-Dist: {dependency.requirement}" for dependency in DEPENDENCIES if dependency.declared),
        "",
    ]
    wheel = ["Wheel-Version: 1.0", "Generator: knet_d2", "Root-Is-Purelib: true", "Tag: py3-none-any", ""]
    contents[f"{DIST_INFO}/LICENSE"] = files["LICENSE"]
    contents[f"{DIST_INFO}/METADATA"] = "\n".join(metadata).encode()
    contents[f"{DIST_INFO}/WHEEL"] = "\n".join(wheel).encode()
    contents[f"{DIST_INFO}/top_level.txt"] = b"detectron2\n"
    return contents


def write_wheel(contents: dict[str, bytes], folder: Path) -> Path:
    """Write ``contents`` and their RECORD as a wheel into ``folder``; equal contents give equal bytes."""
    record = []
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(content)}\n")
    record.append(f"{DIST_INFO}/RECORD,,\n")
    path = folder / f"detectron2-{WHEEL_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**contents, f"{DIST_INFO}/RECORD": "".join(record).encode()}.items():
            info = zipfile.ZipInfo(name)  # has a fixed date, unlike writestr with a name
            info.external_attr = 0o100644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


def build_wheel(sdist: Path, folder: Path) -> Path:
    """Make Detectron2's wheel from its sdist, and write it into ``folder``."""
    files = apply_substitutions(read_sdist(sdist, SDIST_SHA256), SUBSTITUTIONS)
    return write_wheel(wheel_contents(files, SUBSTITUTIONS), folder)


def run_pip(arguments: Sequence[str], **environment: str) -> None:
    """Run pip with additional environment variables; if it fails, raise an InstallError with its last lines."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        # The reasons of a conflict are on stdout
        tail = "\n".join(f"{done.stdout}{done.stderr}".strip().splitlines()[-12:])
        raise InstallError(f"pip {arguments[0]} failed:\n{tail}")


def require(module: str, command: str) -> None:
    """Raise an InstallError with the command if a module is missing."""
    if importlib.util.find_spec(module) is None:
        raise InstallError(f"{module} is missing; install it first: {command}")


def fetch_sdist(folder: Path) -> Path:
    """Download Detectron2's sdist from the package registry into ``folder``, with the pip version of SDIST_TOOLS."""
    require("pip", "python -m ensurepip --upgrade")
    tools = str(folder / "tools")
    path = os.pathsep.join([tools, *filter(None, [os.environ.get("PYTHONPATH")])])
    requirement = folder / "detectron2.txt"
    requirement.write_text(f"{SDIST_NAME}=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n")
    arguments = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
    try:
        run_pip(["install", "--quiet", "--target", tools, *SDIST_TOOLS])
        run_pip([*arguments, "--dest", str(folder), "--requirement", str(requirement)], PYTHONPATH=path)
    except InstallError as error:
        raise InstallError(
            f"Detectron2's sources can't be downloaded. On a machine without a package registry, copy the file "
            f"{SDIST_NAME}-{SDIST_VERSION}.tar.gz to it and repeat with --sdist FILE.\n{error}"
        ) from None
    return folder / f"{SDIST_NAME}-{SDIST_VERSION}.tar.gz"


def package_folder(name: str) -> Path | None:
    """Find the folder of an installed package without importing it; None if it is not installed."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    locations = list(spec.submodule_search_locations or []) if spec else []
    # A folder without __init__.py is what remains of a removed package.
    if not locations or (spec.origin is None and not (Path(locations[0]) / CHANGES_FILE).exists()):
        return None
    return Path(locations[0])


def is_complete(folder: Path) -> bool:
    """Return whether our installation has this version and all its files (pip writes RECORD last)."""
    record = folder.parent / DIST_INFO / "RECORD"
    if not record.is_file():
        return False
    names = [row[0] for row in csv.reader(record.read_text().splitlines()) if row]
    return all((folder.parent / name).exists() for name in names if not name.endswith(".pyc"))


def remove_ours(folder: Path) -> None:
    """Remove our installation. CHANGES_FILE is removed last, so that an interrupted removal can be repeated."""
    for path in folder.parent.glob("detectron2-*+knet*.dist-info"):
        shutil.rmtree(path)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != CHANGES_FILE:
            path.unlink()
    (folder / CHANGES_FILE).unlink()
    folder.rmdir()


def import_error(dependency: Dependency) -> str | None:
    """Import a package in a new process; returns the error in one line, None if there is none."""
    return probe([dependency])[0].get("error")


def install_detectron2(sdist: Path | None = None) -> str:
    """Install Detectron2 unless it can already be imported; returns a sentence on what was done.

    Args:
        sdist: local file with Detectron2's sources; None = download them from the package registry.

    Raises:
        InstallError: Detectron2 can't be installed or imported.
    """
    folder = package_folder("detectron2")
    if folder is not None and not (folder / CHANGES_FILE).exists():  # not ours
        error = import_error(DETECTRON2)
        if error is None:
            return f"detectron2: {folder} can be imported and is not changed"
        raise InstallError(
            f"{folder} is a Detectron2 that this program did not install and that can't be imported ({error}). "
            "Repair it, or remove it (python -m pip uninstall detectron2) and repeat."
        )
    if folder is not None and is_complete(folder):
        done = f"detectron2: {WHEEL_VERSION} is already installed in {folder}"
    else:
        require("torch", TORCH_COMMAND)
        with tempfile.TemporaryDirectory(prefix="knet_d2_") as temporary:
            wheel = build_wheel(sdist or fetch_sdist(Path(temporary)), Path(temporary))
            if folder is not None:
                remove_ours(folder)
            run_pip(["install", "--no-deps", "--no-index", str(wheel)])
        done = f"detectron2: installed {WHEEL_VERSION} in {package_folder('detectron2')}"
    error = import_error(DETECTRON2)
    if error is not None:
        raise InstallError(f"{done}, but it can't be imported: {error}. See: python -m knet_d2.doctor")
    return done


def _panopticapi_requirement(folder: Path) -> list[str]:
    """Return pip's arguments for panopticapi with its hash.

    It is installed without dependencies, because its metadata excludes numpy 2, although its code works with it.
    """
    requirement = folder / "panopticapi.txt"
    requirement.write_text(f"{PANOPTICAPI_REQUIREMENT} --hash=sha256:{PANOPTICAPI_SHA256}\n")
    return ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(requirement)]


def download_panopticapi(folder: Path) -> None:
    """Download the wheel of panopticapi into ``folder``."""
    with tempfile.TemporaryDirectory(prefix="knet_d2_") as temporary:
        run_pip(["download", "--dest", str(folder), *_panopticapi_requirement(Path(temporary))])


def _drop_requirements(folder: Path) -> None:
    """Remove requirements from panopticapi's metadata that the parts in use do not need, so that `pip check` passes."""
    for path in folder.parent.glob("panopticapi_lite-*.dist-info/METADATA"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(x for x in lines if not x.startswith("Requires-Dist:")), encoding="utf-8")


def install_panopticapi(source: Sequence[str] = ()) -> str:
    """Install panopticapi unless it can already be imported; returns a sentence on what was done.

    Args:
        source: pip's arguments that name where it comes from; none: the package registry.
    """
    folder = package_folder("panopticapi")
    if folder is not None and import_error(PANOPTICAPI) is None:
        return f"panopticapi: {folder} can be imported and is not changed"
    with tempfile.TemporaryDirectory(prefix="knet_d2_") as temporary:
        run_pip(["install", "--force-reinstall", *source, *_panopticapi_requirement(Path(temporary))])
    _drop_requirements(package_folder("panopticapi"))
    return f"panopticapi: installed {PANOPTICAPI_REQUIREMENT}"
