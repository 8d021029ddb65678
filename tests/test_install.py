"""Installing Detectron2, examining an installation, packaging. Nothing here needs a network."""

import base64
import csv
import hashlib
import importlib.metadata
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import knet_d2
from knet_d2.config import files as paths
from knet_d2.errors import ConfigError
from knet_d2.setup import doctor, install_detectron2
from knet_d2.setup.dependencies import DEPENDENCIES, Dependency
from knet_d2.setup.install_detectron2 import InstallError, Substitution

ROOT = Path(__file__).resolve().parent.parent

SOURCES = {
    "LICENSE": b"terms",
    "setup.py": b"raise SystemExit",
    "tools/__init__.py": b"",
    "detectron2/__init__.py": b'__version__ = "0.6"\n',
    "detectron2/layers.py": b"np.bool) np.bool_ np.bool)\n",
    "detectron2/model_zoo/configs/a/b.yaml": b"VERSION: 2\n",
    "projects/PointRend/point_rend/__init__.py": b"point = 1\n",
    "projects/Panoptic-DeepLab/panoptic_deeplab/config.py": b"",
}
CHANGE = Substitution("detectron2/layers.py", "np.bool)", "bool)", 2)


def test_substitutions_replace_exactly_what_they_name():
    files = install_detectron2.apply_substitutions(SOURCES, [CHANGE])
    assert files["detectron2/layers.py"] == b"bool) np.bool_ bool)\n"
    assert {**files, "detectron2/layers.py": SOURCES["detectron2/layers.py"]} == SOURCES


@pytest.mark.parametrize(
    "substitution, message",
    [
        (CHANGE._replace(count=1), r"detectron2/layers\.py: 'np\.bool\)' occurs 2 times, expected 1"),
        (CHANGE._replace(old="np.int"), r"detectron2/layers\.py: 'np\.int' occurs 0 times, expected 2"),
        (CHANGE._replace(file="detectron2/gone.py"), r"detectron2/gone\.py: .*lack this file"),
    ],
)
def test_substitution_that_does_not_fit_is_an_error(substitution, message):
    with pytest.raises(InstallError, match=message):
        install_detectron2.apply_substitutions(SOURCES, [substitution])


def write_sdist(path: Path) -> str:
    """Write SOURCES as an sdist; return its sha256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in SOURCES.items():
            info = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_sdist_is_read_only_with_the_right_hash(tmp_path):
    sdist = tmp_path / "sdist.tar.gz"
    sha256 = write_sdist(sdist)
    assert install_detectron2.read_sdist(sdist, sha256) == SOURCES
    with pytest.raises(InstallError, match=f"sdist.tar.gz: its sha256 is {sha256}, expected 000"):
        install_detectron2.read_sdist(sdist, "000")
    with pytest.raises(InstallError, match="nothing.tar.gz: no such file"):
        install_detectron2.read_sdist(tmp_path / "nothing.tar.gz", sha256)


def make_wheel(folder: Path) -> Path:
    contents = install_detectron2.wheel_contents(SOURCES, [CHANGE])
    folder.mkdir(exist_ok=True)
    return install_detectron2.write_wheel(contents, folder)


def test_wheel_record_lists_every_file_with_its_hash_and_size(tmp_path):
    with zipfile.ZipFile(make_wheel(tmp_path)) as wheel:
        record = f"{install_detectron2.DIST_INFO}/RECORD"
        rows = list(csv.reader(wheel.read(record).decode().splitlines()))
        assert [row[0] for row in rows] == wheel.namelist()
        for name, digest, size in rows:
            if name == record:
                assert (digest, size) == ("", "")
                continue
            content = wheel.read(name)
            algorithm, _, value = digest.partition("=")
            assert algorithm == "sha256"
            assert base64.urlsafe_b64decode(value + "=") == hashlib.sha256(content).digest()
            assert int(size) == len(content)
        assert {info.external_attr >> 16 for info in wheel.infolist()} == {0o100644}


def test_wheel_installs_as_detectron2_with_projects_and_configs(tmp_path):
    wheel = make_wheel(tmp_path / "wheel")
    assert wheel.read_bytes() == make_wheel(tmp_path / "again").read_bytes()
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, "--no-compile", str(wheel)], check=True, capture_output=True)
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert {name for name in files if name.startswith("detectron2/")} == {
        "detectron2/KNET_D2_CHANGES.txt",
        "detectron2/__init__.py",
        "detectron2/layers.py",
        "detectron2/model_zoo/configs/a/b.yaml",
        "detectron2/projects/point_rend/__init__.py",
        "detectron2/projects/panoptic_deeplab/config.py",
    }
    assert not any(name.startswith(("tools", "projects", "setup")) for name in files)
    assert "detectron2/layers.py" in (target / "detectron2/KNET_D2_CHANGES.txt").read_text()
    (found,) = importlib.metadata.distributions(path=[str(target)], name="detectron2")
    assert found.version == "0.6+knet1"
    assert not [requirement for requirement in found.requires if "black" in requirement]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty site-packages in which the step works; ``site.calls`` are its calls of pip (to install the wheel)."""

    class Site:
        folder = tmp_path / "site"
        package = folder / "detectron2"
        calls = []
        error = None

        def run_pip(self, arguments):
            self.calls.append(arguments)
            assert not self.package.exists()
            zipfile.ZipFile(arguments[-1]).extractall(self.folder)

    site = Site()
    site.folder.mkdir()
    site.sdist = tmp_path / "sdist.tar.gz"
    monkeypatch.setattr(install_detectron2, "SDIST_SHA256", write_sdist(site.sdist))
    monkeypatch.setattr(install_detectron2, "SUBSTITUTIONS", [CHANGE])
    monkeypatch.setattr(install_detectron2, "run_pip", site.run_pip)
    monkeypatch.setattr(install_detectron2, "import_error", lambda modules: site.error)
    monkeypatch.setattr(
        install_detectron2, "package_folder", lambda name: site.package if site.package.exists() else None
    )
    return site


def test_step_installs_once(site):
    assert "installed 0.6+knet1" in install_detectron2.install_detectron2(site.sdist)
    assert (site.package / "layers.py").read_text() == "bool) np.bool_ bool)\n"
    assert "already installed" in install_detectron2.install_detectron2(site.sdist)
    assert len(site.calls) == 1


@pytest.mark.parametrize("lost", ["detectron2/layers.py", "detectron2-0.6+knet1.dist-info/RECORD"])
def test_step_repairs_its_own_interrupted_installation(site, lost):
    install_detectron2.install_detectron2(site.sdist)
    (site.folder / lost).unlink()
    assert "installed 0.6+knet1" in install_detectron2.install_detectron2(site.sdist)
    assert (site.folder / lost).exists()
    assert len(site.calls) == 2


def test_step_replaces_its_own_older_installation(site):
    install_detectron2.install_detectron2(site.sdist)
    older = site.folder / "detectron2-0.6+knet0.dist-info"
    (site.folder / install_detectron2.DIST_INFO).rename(older)
    install_detectron2.install_detectron2(site.sdist)
    assert len(site.calls) == 2 and not older.exists()


def test_step_changes_nothing_when_the_sources_are_wrong(site):
    install_detectron2.install_detectron2(site.sdist)
    (site.package / "layers.py").unlink()
    before = sorted(site.folder.rglob("*"))
    site.sdist.write_bytes(b"damaged")
    with pytest.raises(InstallError, match="sha256"):
        install_detectron2.install_detectron2(site.sdist)
    assert sorted(site.folder.rglob("*")) == before


def test_step_leaves_the_detectron2_of_others_alone(site):
    site.package.mkdir()
    (site.package / "__init__.py").write_text("their = 1")
    assert "is not changed" in install_detectron2.install_detectron2(site.sdist)
    site.error = "ImportError: undefined symbol"
    with pytest.raises(InstallError, match=r"site/detectron2 is a .* \(ImportError: undefined symbol\)"):
        install_detectron2.install_detectron2(site.sdist)
    assert (site.package / "__init__.py").read_text() == "their = 1" and not site.calls


def test_package_folder_does_not_count_an_emptied_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "some_package_of_the_test"
    package.mkdir()
    assert install_detectron2.package_folder(package.name) is None
    (package / "__init__.py").write_text("raise ImportError")
    assert install_detectron2.package_folder(package.name) == package


# Blocks the top-level modules named in BLOCKED, in every Python process that has this file's folder on its path.
SITE_CUSTOMIZE = """
import os, sys
class Blocker:
    def find_spec(name, path=None, target=None):
        if name in os.environ["BLOCKED"].split(","):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Blocker)
"""


def run_python(folder: Path, *arguments: str, blocked: str = "", modules: dict | None = None):
    """Run Python without the modules ``blocked``, with ``modules`` {name: source} in place of the installed ones."""
    (folder / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
    for name, source in (modules or {}).items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").write_text(source)
    environment = {**os.environ, "BLOCKED": blocked, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=folder)


def table_rows(output: str) -> dict:
    """{part: its whole line} of the doctor's table."""
    lines = output.partition("-----\n")[2].splitlines()
    return {line.split()[0]: line for line in lines if line and not line.startswith(" ")}


def test_doctor_names_all_that_is_wrong_and_what_mends_it(tmp_path):
    modules = {
        "cv2": "__version__ = '3.4.1'",
        "scipy": "import os; os._exit(3)",
        "detectron2": "print('noise'); raise AttributeError('no LINEAR')",
    }
    done = run_python(tmp_path, "-m", "knet_d2.doctor", blocked="torch,shapely", modules=modules)
    assert done.returncode == 1, done.stderr
    rows = table_rows(done.stdout)
    assert re.match(r"torch +missing +python -m pip install --upgrade torch torchvision$", rows["torch"])
    assert re.match(r"shapely +missing +python -m pip install --upgrade shapely$", rows["shapely"])
    no_torch = "ModuleNotFoundError: No module named 'torch'"
    assert re.match(f"torchvision +broken +{no_torch} +install torch first", rows["torchvision"])
    assert re.match(r"cv2 +too old +3\.4\.1, at least 4\.5 is needed +python -m pip install", rows["cv2"])
    assert re.match(r"scipy +broken +importing it ended the process with status 3", rows["scipy"])
    assert re.match(r"detectron2 +broken +AttributeError: no LINEAR +.*install_detectron2$", rows["detectron2"])
    assert re.match(r"knet_d2 +broken", rows["knet_d2"])
    # what comes after the crash is still examined
    assert re.match(r"yaml +ok +\d", rows["yaml"])
    assert set(rows) >= {"Python", *(dependency.module for dependency in DEPENDENCIES)}


def test_doctor_finds_this_installation_well(tmp_path):
    done = run_python(tmp_path, "-m", "knet_d2.doctor", blocked="timm")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table_rows(done.stdout)
    assert re.match(r"timm +optional +not installed, for K-Net Lite .*python -m pip install", rows["timm"])
    assert {"onnx", "onnxruntime"} <= set(rows)
    assert "Everything that is required is installed." in done.stdout
    assert re.search(r"with(out)? compiled extension in", rows["detectron2"])
    assert re.match(r"device +ok +(CPU only|MPS|CUDA: .+)$", rows["device"])


@pytest.mark.parametrize(
    "version, minimum, status",
    [
        ("2.14.1+cu130", "2.10", doctor.OK),
        ("2.9.1", "2.10", doctor.TOO_OLD),
        ("2.10", "2.10", doctor.OK),
        ("9", None, doctor.OK),
    ],
)
def test_versions_are_compared_as_numbers(version, minimum, status):
    dependency = Dependency("package", "package", minimum)
    assert doctor.judge(dependency, {"module": "package", "version": version}).status == status


USES = {
    "load": "import knet_d2; knet_d2.load",
    "class": "from knet_d2 import KNet",
    "room": "import knet_d2.engine",
    "room by name": "from knet_d2 import data",
    "module": "import knet_d2.model_zoo",
    "program": "import knet_d2.programs.demo",
}


@pytest.mark.parametrize(
    "modules, blocked, reason, use",
    [
        *(({}, "detectron2", "which is not installed", use) for use in USES),
        ({}, "torch", "which can't be imported .ModuleNotFoundError: No module named 'torch'", "load"),
        (
            {"detectron2": "raise AttributeError('no LINEAR')"},
            "",
            "which can't be imported .AttributeError: no LINEAR",
            "room",
        ),
    ],
)
def test_first_use_without_detectron2_is_one_error_with_the_command(tmp_path, modules, blocked, reason, use):
    code = f"import knet_d2; print(knet_d2.__version__); {USES[use]}"
    done = run_python(tmp_path, "-c", code, blocked=blocked, modules=modules)
    assert done.stdout.strip() == knet_d2.__version__
    assert done.stderr.count("Traceback") == 1
    last = done.stderr.splitlines()[-1]
    assert re.match(f"ImportError: knet_d2 needs Detectron2, {reason}", last)
    assert last.endswith("python -m knet_d2.install_detectron2")


def test_without_panopticapi_the_command_that_installs_it_works(tmp_path):
    """Those who have built Detectron2 themselves lack only panopticapi."""
    done = run_python(tmp_path, "-c", "import knet_d2; knet_d2.load", blocked="panopticapi")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: knet_d2 needs panopticapi, which is not installed. "
        "Install it with: python -m knet_d2.install_detectron2"
    )
    for module in ("install_detectron2", "doctor"):
        done = run_python(tmp_path, "-m", f"knet_d2.{module}", "--help", blocked="panopticapi")
        assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_a_program_without_detectron2_ends_with_the_command(tmp_path):
    done = run_python(tmp_path, str(ROOT / "demo" / "demo.py"), "--input", "a.jpg", blocked="detectron2")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ImportError: knet_d2 needs Detectron2")


def test_the_command_without_detectron2_is_one_line(tmp_path):
    done = run_python(tmp_path, "-m", "knet_command", "train", "--data", "photos", blocked="detectron2")
    assert done.returncode == 1 and done.stderr.strip() == (
        "Error: knet_d2 needs Detectron2, which is not installed. Install it with: python -m knet_d2.install_detectron2"
    )


def test_load_without_opencv_is_one_error_with_the_command(tmp_path):
    """Only knet_d2.load needs OpenCV; training does not."""
    done = run_python(tmp_path, "-c", "import knet_d2; knet_d2.load", blocked="cv2")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: knet_d2.load needs cv2, which is not installed: python -m knet_d2.doctor"
    )


def test_install_step_needs_the_standard_library_only(tmp_path):
    blocked = ",".join(["setuptools", *(dependency.module for dependency in DEPENDENCIES)])
    done = run_python(tmp_path, "-m", "knet_d2.install_detectron2", "--help", blocked=blocked)
    assert done.returncode == 0 and "--sdist FILE" in done.stdout, done.stderr


def setup_arguments(monkeypatch) -> dict:
    """The keyword arguments that setup.py gives to setuptools."""
    import setuptools

    captured = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: captured.update(kwargs))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return captured


def test_setup_requires_loosely_and_neither_detectron2_nor_an_opencv(monkeypatch):
    arguments = setup_arguments(monkeypatch)
    assert arguments["version"] == knet_d2.__version__
    assert {"torch>=2.10", "numpy>=1.26", "fvcore>=0.1.5"} <= set(arguments["install_requires"])
    for requirement in arguments["install_requires"]:
        assert re.fullmatch(r"[\w-]+(>=[\d.]+)?", requirement)
        assert not re.match("detectron2|panopticapi|opencv", requirement)


def test_requirements_pin_every_dependency_within_its_bounds():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    for dependency in DEPENDENCIES:
        if dependency.module in ("detectron2", "panopticapi"):
            continue
        pin = pins[dependency.distribution.lower()]
        assert doctor.version_tuple(pin) >= doctor.version_tuple(dependency.minimum or "0")


def test_wheel_of_knet_d2_holds_configs_documents_and_tables(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("knet_d2", "configs", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "demo" / "fruits_nuts").mkdir(parents=True)
    pages = ("README.md", "MODEL_ZOO.md", "CHANGELOG.md", "demo/README.md", "demo/fruits_nuts/README.md")
    for name in pages:
        shutil.copy(ROOT / name, source / name)
    for name in ("setup.py", "knet_command.py", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("knet_d2-*.whl")
    expected = {path for folder in ("knet_d2", "configs") for path in (source / folder).rglob("*") if path.is_file()}
    expected |= set((source / "docs").rglob("*.md"))  # not the pictures and tables
    expected = {str(path.relative_to(source)) for path in expected}
    expected = {f"knet_d2/{name}" if name.startswith(("configs/", "docs/")) else name for name in expected}
    expected |= {"knet_command.py", *(f"knet_d2/docs/{name}" for name in pages)}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") or name.endswith("dist-info/LICENSE") for name in names)


def test_config_files_are_found_by_name():
    some = next(path for path in (ROOT / "configs").rglob("*.yaml"))
    name = str(some.relative_to(ROOT / "configs"))
    assert Path(paths.get_config_file(name)).read_text() == some.read_text()
    with pytest.raises(ConfigError, match="shapes/nothing.yaml: no such config file in .*configs"):
        paths.get_config_file("shapes/nothing.yaml")


def test_panopticapi_declares_nothing_that_is_not_there(tmp_path):
    """Its wheel requires numpy below 2, so that `pip check` would complain."""
    metadata = tmp_path / "panopticapi_lite-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Name: panopticapi-lite\nRequires-Dist: numpy<2.0.0\nRequires-Python: >=3.9\n\nText\n")
    install_detectron2._drop_requirements(tmp_path / "panopticapi")
    assert metadata.read_text() == "Name: panopticapi-lite\nRequires-Python: >=3.9\n\nText\n"
