"""Installing without a network: what is downloaded for another machine, and what pip installs there."""

import zipfile
from pathlib import Path

import pytest

from knet_d2.setup import install_program, offline
from knet_d2.setup.dependencies import Dependency
from knet_d2.setup.install_detectron2 import InstallError
from knet_d2.setup.offline import Target


def write_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {x}" for x in requires),
    ]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name.replace('-', '_')}.py", f"version = '{version}'\n")
        wheel.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder of wheels in place of the registry, which knows two packages that knet_d2 needs."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name, version, *requires in (
        ("base", "1.5", "below-base"),
        ("base", "2.0", "below-base"),
        ("below-base", "1.0"),
        ("on-base", "1.0", "base<2"),
        ("on-base", "2.0", "base>=2"),
        ("opencv-python-headless", "4.9"),
    ):
        write_wheel(folder, name, version, *requires)

    def fetch_sdist(work):
        (work / "sdist").write_text("sources")
        return work / "sdist"

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(offline, "fetch_sdist", fetch_sdist)
    monkeypatch.setattr(offline, "download_panopticapi", lambda folder: None)
    monkeypatch.setattr(offline, "SOURCES_ONLY", ())
    needed = (Dependency("no_base", "Base", "1.0"), Dependency("no_on_base", "on_base"))
    monkeypatch.setattr(offline, "DEPENDENCIES", (*needed, Dependency("no_more", "no-more", declared=False)))
    return folder


def downloaded(folder, **target):
    offline.download(folder, Target(**target))
    return sorted(path.name.partition("-py3")[0] for path in folder.iterdir())


SDIST = "pb1-detectron2-0.6.tar.gz"
OPENCV = "opencv_python_headless-4.9"


def test_all_is_downloaded_for_a_machine_that_has_nothing(registry, tmp_path):
    assert downloaded(tmp_path / "f") == ["base-2.0", "below_base-1.0", "on_base-2.0", OPENCV, SDIST]


@pytest.mark.parametrize(
    "installed, expected",
    [
        # Neither base nor its dependencies, and of the others the version that fits
        ({"base": "1.5"}, ["on_base-1.0", OPENCV, SDIST]),
        ({"base": "2.0+cu130"}, ["on_base-2.0", OPENCV, SDIST]),
        # The registry has no such version
        ({"base": "2.7.dev3"}, ["on_base-2.0", OPENCV, SDIST]),
        ({"base": "1.9", "on-base": "1.0", "opencv-python": "4.1"}, [SDIST]),
    ],
)
def test_what_a_machine_has_is_left_out_and_decides_the_versions_of_the_rest(registry, tmp_path, installed, expected):
    assert (
        downloaded(tmp_path / "f", installed=installed, python="3.12", platforms=["manylinux_2_28_x86_64"]) == expected
    )


def test_a_listed_version_that_nothing_fits_is_an_error_that_names_it(registry, tmp_path):
    with pytest.raises(InstallError, match=r"base==0\.5"):
        offline.download(tmp_path / "f", Target(installed={"base": "0.5", "on-base": "1.0"}), ["Base>=1"])


def test_a_folder_is_installed_without_an_index(registry, tmp_path, monkeypatch):
    folder, site = tmp_path / "f", tmp_path / "site"
    offline.download(folder, Target())
    for path in registry.iterdir():
        path.unlink()
    called = []
    monkeypatch.setenv("PIP_TARGET", str(site))
    monkeypatch.setattr(offline, "install_detectron2", lambda sdist: called.append(sdist.name) or "detectron2")
    monkeypatch.setattr(offline, "install_panopticapi", lambda source: called.append(source[0]) or "panopticapi")
    lines = offline.install_from(folder)
    assert lines == ["dependencies: installed Base>=1.0, on_base", "detectron2", "panopticapi"]
    assert (site / "on_base.py").read_text() == "version = '2.0'\n" and (site / "below_base.py").exists()
    assert called == [SDIST, "--no-index"]


def test_a_folder_without_what_is_missing_is_an_error(registry, tmp_path, capsys):
    folder = tmp_path / "f"
    offline.download(folder, Target(installed={"base": "2.0"}))
    (registry / "base-2.0-py3-none-any.whl").unlink()
    (registry / "base-1.5-py3-none-any.whl").unlink()
    with pytest.raises(InstallError, match="No matching distribution found for Base"):
        offline.install_from(folder)
    assert install_program.main(["--from", str(tmp_path / "other")]) == 1
    assert f"--from {tmp_path / 'other'}: no {SDIST} in it." in capsys.readouterr().err


def test_lists_of_installed_packages(tmp_path):
    (tmp_path / "list.txt").write_text("torch==2.11.0+cu130\nPyYAML==6.0.2\n\nhydra_core==1.3.2\n")
    expected = {"torch": "2.11.0+cu130", "pyyaml": "6.0.2", "hydra-core": "1.3.2"}
    assert offline.read_installed(str(tmp_path / "list.txt")) == expected
    assert offline.read_installed("torch==2.11.0+cu130, PyYAML==6.0.2,hydra_core==1.3.2") == expected
    with pytest.raises(InstallError, match="'numpy' is no NAME==VERSION"):
        offline.read_installed("torch==2.11.0,numpy")


def test_platforms_accept_the_wheels_of_older_ones():
    found = offline.expanded_platforms(["manylinux_2_28_x86_64", "macosx_11_0_arm64"])
    assert found[0] == "manylinux_2_28_x86_64" and found[-1] == "macosx_11_0_arm64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"} < set(found)
    assert len(found) == 24 + 3 + 1
    assert not any("2_29" in name or "2_4_" in name for name in found)


@pytest.mark.parametrize("words", [["--python", "3.12"], ["--also", "onnx"], ["--from", "a", "--missing-on", "b"]])
def test_options_of_another_mode_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        install_program.main(words)
    assert "belong" in capsys.readouterr().err
