"""Official checkpoints and pretrained backbones: loaded whole, reported name by name, refused where they don't fit."""

import io
import os
import pickle
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from backbone_helpers import TINY_SWIN
from checkpoint_helpers import Exploit, assert_same_state, randomised, save
from helpers import tiny_config, tiny_model
from official_layout import official_checkpoint, official_state_dict

from knet_d2.checkpoint import Checkpointer, load_file, read_description
from knet_d2.checkpoint.load_report import summarise
from knet_d2.checkpoint.saving import save_weights
from knet_d2.checkpoint.zoo import build_on_meta
from knet_d2.errors import CheckpointError, ConfigError
from knet_d2.model_zoo import get_config
from knet_d2.programs import convert_checkpoint

SWIN = {
    **{TINY_SWIN[i]: TINY_SWIN[i + 1] for i in range(0, len(TINY_SWIN), 2)},
    "MODEL.BACKBONE.NAME": "build_knet_swin_fpn_backbone",
}


def run_convert(*arguments):
    convert_checkpoint.main(convert_checkpoint.get_parser().parse_args([str(x) for x in arguments]))


def refusal(model, path, **kwargs):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        Checkpointer(model, **kwargs).load(path)
    assert path in str(error.value)
    if next(model.parameters()).device.type != "meta":
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return str(error.value)


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("task, name", [("instance", "a.pth"), ("panoptic", "a.pkl"), ("semantic", "no_ending")])
def test_official_checkpoint_loads_as_it_is(tmp_path, task, name):
    source, target = randomised(tiny_model(task)), tiny_model(task, seed=1)
    path = save(tmp_path, official_checkpoint(source.state_dict()), name)
    checkpointer = Checkpointer(target)
    checkpointer.load(path)
    report = checkpointer.report
    assert len(report.loaded) == len(source.state_dict())
    assert not (report.missing or report.unexpected or report.other_shape or report.ignored)
    stages = range(3)
    assert [pair.name for pair in report.reshaped] == [f"cascade.stages.{i}.feature_transform.weight" for i in stages]
    assert_same_state(source.state_dict(), target.state_dict())


def test_counters_that_the_model_lacks_are_ignored(tmp_path):
    """The official release's batch norms in eval mode count batches; a frozen batch norm of Detectron2 does not."""
    source = randomised(tiny_model("instance"))
    content = official_checkpoint(source.state_dict())
    target = tiny_model("instance", {"MODEL.RESNETS.NORM": "FrozenBN"})
    checkpointer = Checkpointer(target)
    checkpointer.load(save(tmp_path, content))
    counters = [name for name in content["state_dict"] if name.endswith("num_batches_tracked")]
    assert sorted(checkpointer.report.ignored) == sorted(counters) and len(counters) == 53
    assert not checkpointer.report.missing


def test_other_numbers_of_classes_and_kernels(tmp_path):
    source = randomised(tiny_model("panoptic"))
    options = {"MODEL.KNET.NUM_THING_CLASSES": 4, "MODEL.KNET.NUM_STUFF_CLASSES": 0, "MODEL.KNET.NUM_KERNELS": 7}
    target = tiny_model("instance", options, seed=1)
    initial = {name: value.clone() for name, value in target.state_dict().items()}
    path = save(tmp_path, official_checkpoint(source.state_dict()))
    checkpointer = Checkpointer(target, partial=True)
    checkpointer.load(path)
    classifiers = [f"cascade.stages.{i}.class_branch.3.{part}" for i in range(3) for part in ("weight", "bias")]
    started_anew = {"sem_seg_head.instance_kernels.weight", *classifiers}
    started_anew |= {"sem_seg_head.classifier.weight", "sem_seg_head.classifier.bias"}
    report, state = checkpointer.report, target.state_dict()
    assert {pair.name for pair in report.other_shape} == started_anew and not report.missing
    assert_same_state(initial, state, started_anew)
    assert_same_state(source.state_dict(), state, report.loaded)
    assert len(report.loaded) + len(started_anew) == len(state)
    text = report.as_text()
    assert "cascade.stages.{0-2}.class_branch.3.weight (3): (5, 32) in the file, (4, 32) here" in text
    assert "instance_kernels.weight: (6, 32, 1, 1) in the file, (7, 32, 1, 1) here" in text
    message = refusal(tiny_model("instance", options), path)
    assert "9 have another shape" in message and "(6, 32, 1, 1) in the file, (7, 32, 1, 1) in the model" in message


def test_another_structure_is_refused_in_training_too(tmp_path):
    path = save(tmp_path, official_checkpoint(tiny_model("instance").state_dict()))
    fewer = refusal(tiny_model("instance", {"MODEL.KNET.NUM_STAGES": 2}), path, partial=True)
    assert "in the file are not in the model (cascade.stages.2." in fewer
    more = refusal(tiny_model("instance", {"MODEL.KNET.NUM_STAGES": 4}), path, partial=True)
    assert "of the model's parameters are not in the file (cascade.stages.3." in more
    other = refusal(tiny_model("instance", {"MODEL.KNET.POSITION_ENCODING": "coordinates"}), path, partial=True)
    assert "1 have another shape (sem_seg_head.semantic_fpn.levels.p5.0.weight" in other
    narrow = refusal(tiny_model("instance", {"MODEL.KNET.UPDATE_HEAD.FFN_DIM": 40}), path, partial=True)
    assert "(48, 32) in the file, (40, 32) in the model" in narrow


def test_auxiliary_head_may_be_missing_or_too_much(tmp_path):
    without = {"MODEL.KNET.LOSS.AUXILIARY_WEIGHT": 0.0}
    path = save(tmp_path, official_checkpoint(tiny_model("semantic").state_dict()))
    checkpointer = Checkpointer(tiny_model("semantic", without))
    checkpointer.load(path)
    assert checkpointer.report.unexpected and all(x.startswith("auxiliary") for x in checkpointer.report.unexpected)
    path = save(tmp_path, {"model": tiny_model("semantic", without).state_dict()})
    checkpointer = Checkpointer(tiny_model("semantic"))
    checkpointer.load(path)
    assert checkpointer.report.missing and all(x.startswith("auxiliary") for x in checkpointer.report.missing)


def test_foreign_entries_of_an_official_file_are_named(tmp_path):
    content = official_checkpoint(tiny_model("instance").state_dict())
    content["state_dict"]["roi_head.bbox_head.fc.weight"] = torch.zeros(2, 2)
    message = refusal(tiny_model("instance"), save(tmp_path, content), partial=True)
    assert "1 in the file are not in the model (roi_head.bbox_head.fc.weight)" in message


def test_weights_of_another_zoo_model_are_refused_by_its_name(tmp_path):
    """Files with the names and shapes of the real models."""
    states = {}
    for name in ("coco/panoptic/knet_r50_fpn_1x", "ade20k/semantic/knet_fcn_r50_d8_80k"):
        state = official_state_dict(build_on_meta(get_config(name)).state_dict())
        states[name] = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
    model = build_on_meta(get_config("coco/instance/knet_r50_fpn_1x"))
    panoptic = save(tmp_path, {"state_dict": states["coco/panoptic/knet_r50_fpn_1x"]}, "panoptic.pth")
    message = refusal(model, panoptic)
    assert "(133, 256, 1, 1) in the file, (80, 256, 1, 1) in the model" in message
    found = "configs/coco/panoptic/knet_r50_fpn_1x.yaml or configs/coco/panoptic/knet_r50_fpn_3x.yaml"
    assert message.endswith(f"It is a checkpoint for {found}.")
    semantic = save(tmp_path, {"state_dict": states["ade20k/semantic/knet_fcn_r50_d8_80k"]}, "semantic.pth")
    message = refusal(model, semantic, partial=True)
    assert message.endswith("It is a checkpoint for configs/ade20k/semantic/knet_fcn_r50_d8_80k.yaml.")
    message = refusal(torch.nn.Linear(2, 2), semantic)
    assert "none of the" in message
    assert message.endswith("It is a checkpoint for configs/ade20k/semantic/knet_fcn_r50_d8_80k.yaml.")
    with pytest.raises(CheckpointError, match="does not fit coco/instance/knet_r50_fpn_1x.*knet_r50_fpn_3x.yaml.$"):
        convert_checkpoint.convert(panoptic, "coco/instance/knet_r50_fpn_1x", ())


# ---------------------------------------------------------------- pretrained backbones


def bottom_up(model):
    prefix = "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."
    return prefix, {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}


def as_detectron2(state):
    content = {name: value.numpy() for name, value in state.items() if not name.startswith("fpn")}
    content["stem.fc.bias"] = torch.zeros(3).numpy()
    return {"model": content, "__author__": "torchvision", "matching_heuristics": True}


def as_openmmlab(model):
    state = official_state_dict(model.state_dict())
    bare = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    return {**bare, "fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}


def as_swin_release(state):
    """The merging layers are constant along their permutation, which another test checks."""
    names = [("attention.", "attn."), ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2"), ("embed.projection", "embed.proj")]
    content = {"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3), "norm.weight": torch.zeros(4)}
    for name, value in state.items():
        if name.startswith("out_norms"):
            continue
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        stage, _, rest = name.removeprefix("stages.").partition(".")
        if rest.startswith("merging"):
            name = f"layers.{int(stage) - 1}.{rest.replace('merging', 'downsample')}"
            value = value.fill_(0.25)
        content[name.replace("stages.", "layers.")] = value
    content["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    content["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    return {"model": content}


@pytest.mark.parametrize("kind", ["detectron2", "openmmlab", "openmmlab_state_dict", "torchvision_fpn", "swin"])
def test_pretrained_backbones(tmp_path, kind, caplog):
    stem = {"MODEL.RESNETS.STEM_TYPE": "deeplab"}
    task, options = {
        "detectron2": ("panoptic", {}),
        "torchvision_fpn": ("instance", {}),
        "swin": ("panoptic", SWIN),
    }.get(kind, ("semantic", {**stem, "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"]}))
    source, target = randomised(tiny_model(task, options)), tiny_model(task, options, seed=1)
    prefix, state = bottom_up(source)
    path = str(tmp_path / "backbone")
    if kind == "detectron2":
        Path(path).write_bytes(pickle.dumps(as_detectron2(state), protocol=2))
    elif kind == "swin":
        torch.save(as_swin_release(state), path, _use_new_zipfile_serialization=False)
    else:
        content = as_openmmlab(source)
        torch.save({"state_dict": content} if kind == "openmmlab_state_dict" else content, path)
    checkpointer = Checkpointer(target, partial=True)
    with caplog.at_level("INFO"):
        checkpointer.load(path)
    report = checkpointer.report
    # A complete backbone is told in one line; Swin's norms of the outputs are listed
    assert ("re-initialised: not in the file" in caplog.text) == (kind == "swin")
    assert ("The rest learns from random ones: " in caplog.text) == (kind != "swin")
    in_file = [name for name in state if not name.startswith("out_norms")]
    assert set(report.loaded) == {prefix + name for name in in_file}
    assert_same_state(source.state_dict(), target.state_dict(), report.loaded)
    assert not report.unexpected and not report.other_shape
    assert len(report.ignored) == {"swin": 5, "detectron2": 1}.get(kind, 2)
    new = [name for name in report.missing if name.startswith(prefix) and "fpn" not in name]
    assert len(new) == (8 if kind == "swin" else 0) and all("out_norms" in name for name in new)
    assert any(name.startswith("cascade.") for name in report.missing)
    assert "pretrained backbone to start a training run from" in refusal(target, path)


def test_backbone_of_another_depth_or_stem_is_refused(tmp_path):
    deeper = tiny_model("instance", {"MODEL.RESNETS.DEPTH": 101})
    path = save(tmp_path, as_openmmlab_deep(deeper))
    message = refusal(tiny_model("instance"), path, partial=True)
    assert "in the file are not in the model (backbone.bottom_up.res4.{6-22}.conv{1-3}.weight (51)" in message
    path = save(tmp_path, as_openmmlab(tiny_model("instance")))
    assert "not in the file (backbone.bottom_up.res4.{6-22}" in refusal(deeper, path, partial=True)
    wide = tiny_model("instance", {"MODEL.RESNETS.STEM_TYPE": "deeplab"})
    message = refusal(wide, path, partial=True)
    assert "stem.conv1.weight" in message and "(8, 3, 7, 7) in the file" in message


def as_openmmlab_deep(model):
    """torchvision's names of a ResNet with more blocks than ``official_layout`` knows."""
    _, state = bottom_up(model)
    renamed = {}
    for name, value in state.items():
        for i in (2, 3, 4, 5):
            name = name.replace(f"res{i}", f"layer{i - 1}")
        for i in (1, 2, 3):
            name = name.replace(f"conv{i}.norm", f"bn{i}")
        name = name.replace("shortcut.norm", "downsample.1").replace("shortcut.", "downsample.0.")
        renamed[name.removeprefix("stem.")] = value
    return renamed


def test_backbone_for_a_model_that_ends_earlier(tmp_path):
    """The semantic test model ends at res4; res5 of the file is reported and does no harm."""
    source = randomised(tiny_model("semantic", {"MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"]}))
    checkpointer = Checkpointer(tiny_model("semantic"), partial=True)
    checkpointer.load(save(tmp_path, as_openmmlab(source)))
    unexpected = checkpointer.report.unexpected
    assert unexpected and all(name.startswith("backbone.res5.") for name in unexpected)
    assert_same_state(source.state_dict(), checkpointer.model.state_dict(), checkpointer.report.loaded)


# ---------------------------------------------------------------- files that must not be trusted


def _places(state_dict):
    name = next(iter(state_dict))
    yield "meta", {"state_dict": state_dict, "meta": {"config": Exploit()}}
    yield "optimizer", {"state_dict": state_dict, "optimizer": Exploit()}
    yield "parameter", {"state_dict": {**state_dict, name: Exploit()}}
    yield "whole", Exploit()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_never_runs(tmp_path, form):
    Exploit.target = str(tmp_path / "made_by_exploit")
    state_dict = {} if form == "pickle" else official_state_dict(tiny_model("instance").state_dict())
    state_dict = state_dict or {"res2.0.conv1.weight": torch.zeros(1).numpy()}
    model = tiny_model("instance")
    for place, content in _places(state_dict):
        path = tmp_path / f"{place}.pth"
        if form == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        assert "mkdir" in refusal(model, str(path)) and not os.path.exists(Exploit.target)
        with pytest.raises(CheckpointError, match="mkdir"):
            convert_checkpoint.convert(str(path), None, ())
        assert not os.path.exists(Exploit.target)


def test_a_tar_archive_is_not_given_to_pytorch(tmp_path, monkeypatch):
    """This holds even if the name of the first member begins like an old PyTorch file."""
    legacy, stream = io.BytesIO(), io.BytesIO()
    torch.save({}, legacy, _use_new_zipfile_serialization=False)
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    header = bytearray(stream.getvalue()[:512])
    header[:16] = legacy.getvalue()[:16]
    header[148:156] = b" " * 8  # what its checksum stands for in the sum
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "archive.pth"
    path.write_bytes(header + stream.getvalue()[512:])
    assert tarfile.is_tarfile(path)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("PyTorch reads it"))
    assert "not a weights file" in refusal(tiny_model("instance"), str(path))


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files(tmp_path, legacy):
    model = tiny_model("instance")
    stream = io.BytesIO()
    torch.save(official_checkpoint(model.state_dict()), stream, _use_new_zipfile_serialization=not legacy)
    data, path = stream.getvalue(), tmp_path / "cut.pth"
    for part in (0.01, 0.3, 0.999):
        path.write_bytes(data[: int(len(data) * part)])
        assert "damaged" in refusal(model, str(path))


# ---------------------------------------------------------------- conversion


def test_convert_tool(tmp_path, capsys):
    model = randomised(tiny_model("panoptic"))
    source = save(tmp_path, official_checkpoint(model.state_dict()), "official.pth")
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_config("panoptic").dump())
    output = str(tmp_path / "ours.pth")
    run_convert(source, output, "--config", config)
    assert "loaded" in capsys.readouterr().out
    content = torch.load(output, weights_only=True)
    assert content["metadata"]["source"] == "official.pth"
    cfg, classes = read_description(content, output)
    assert cfg.MODEL.KNET.NUM_KERNELS == 6 and classes.num_things == 3 and len(classes.names) == 5
    assert sorted(content["model"]) == sorted(model.state_dict())
    target = tiny_model("panoptic", seed=1)
    Checkpointer(target).load(output)
    assert_same_state(model.state_dict(), target.state_dict())
    with pytest.raises(CheckpointError, match="does not fit coco/panoptic/knet_r50_fpn_1x"):
        convert_checkpoint.convert(source, "coco/panoptic/knet_r50_fpn_1x", ())
    absent = str(tmp_path / "absent" / "x.pth")
    with pytest.raises(CheckpointError, match=f"{absent}: can't be written"):
        run_convert(source, absent, "--config", config)
    with pytest.raises(CheckpointError, match="must end in"):
        run_convert(source, str(tmp_path / "x.bin"), "--config", config)
    with pytest.raises(ConfigError, match=f"this would replace {source}, which is read"):
        run_convert(source, source, "--config", config)


def test_convert_tool_reads_what_it_wrote(tmp_path):
    pytest.importorskip("safetensors")
    model = randomised(tiny_model("instance"))
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_config("instance").dump())
    path = save(tmp_path, official_checkpoint(model.state_dict()), "official.pth")
    for name, options in (("a.pth", ["--config", config]), ("b.safetensors", []), ("c.pth", [])):
        output = str(tmp_path / name)
        run_convert(path, output, *options)
        path = output
    state = load_file(path)["model"]
    assert_same_state(model.state_dict(), state)
    assert len(state) == len(model.state_dict())


def test_convert_tool_finds_the_config(tmp_path):
    state = official_state_dict(build_on_meta(get_config("coco/instance/knet_r50_fpn_1x")).state_dict())
    with pytest.raises(CheckpointError, match="knet_r50_fpn_1x or coco/instance/knet_r50_fpn_3x. Give one"):
        convert_checkpoint.find_config("weights.pth", state)
    name = "knet_s3_r50_fpn_1x_coco_20211016_113017-8a8645d4.pth"
    assert convert_checkpoint.find_config(str(tmp_path / name), state) == "coco/instance/knet_r50_fpn_1x"


def test_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    source, target = randomised(tiny_model("instance")), tiny_model("instance", seed=1)
    path = str(tmp_path / "model.safetensors")
    save_weights(path, source.state_dict(), {"config": "tiny"})
    assert load_file(path)["metadata"] == {"format": "pt", "config": "tiny"}
    renamed = str(tmp_path / "model.pth")
    os.rename(path, renamed)
    Checkpointer(target).load(renamed)
    assert_same_state(source.state_dict(), target.state_dict())
    Path(renamed).write_bytes(Path(renamed).read_bytes()[:-100])
    assert "damaged" in refusal(target, renamed)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        save_weights(str(path), {"a": torch.zeros(1)}, {})
    assert not path.exists()
    path.write_bytes((2).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        load_file(str(path))


def test_names_are_summarised():
    names = [f"a.{i}.conv{j}.{part}" for i in (0, 1, 2, 5) for j in (1, 2) for part in ("weight", "bias")]
    assert summarise([*names, "b.weight"]) == ["a.{0,1,2,5}.conv{1,2}.{weight,bias} (16)", "b.weight"]
    assert summarise(["r.3.x", "r.1.x", "r.2.x"]) == ["r.{1-3}.x (3)"]
