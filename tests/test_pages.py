"""Pages of the documents whose examples are one program, run from the first to the last with a tiny model."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from helpers import RESNET, SMALL, TASKS, set_options

import knet_command
import knet_d2
from knet_d2 import model_zoo
from knet_d2.config import add_knet_config
from knet_d2.data.shapes import THING_CLASSES, write_shapes

DOCS = Path(__file__).resolve().parent.parent / "docs"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What makes a program of a page short
SHORT = {"cfg.SOLVER.MAX_ITER": 2, "cfg.SOLVER.STEPS": (), "cfg.TEST.EVAL_PERIOD": 2}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The reader's files."""
    write_shapes(str(tmp_path / "my_photos"), num_images=4, seed=5, size=64)
    folder = tmp_path / "my_photos"
    (folder / "instances.json").rename(folder / "annotations.json")
    shutil.copy(folder / "images" / "000000.jpg", folder / "new.jpg")
    monkeypatch.chdir(tmp_path)
    return folder


def tiny_instance_config(name, trained=False):
    assert name in model_zoo.names() and trained
    cfg = get_cfg()
    add_knet_config(cfg)
    sizes = {"INPUT.MIN_SIZE_TRAIN": (64,), "INPUT.MIN_SIZE_TEST": 64, "DATALOADER.NUM_WORKERS": 0}
    sizes.update({"MODEL.KNET.NUM_STAGES": 1, "TEST.REPORT": False, "TEST.NUM_PICTURES": 0})
    return set_options(cfg, {**SMALL, **RESNET, **TASKS["instance"], "MODEL.KNET.TASK": "instance", **sizes})


def test_from_mask_rcnn(photos, monkeypatch, capsys):
    monkeypatch.setattr(model_zoo, "get_config", tiny_instance_config)
    text = (DOCS / "FROM_MASK_RCNN.md").read_text()
    for key, value in SHORT.items():
        text, count = re.subn(rf"(?<={re.escape(key)} = ).*", str(value), text)
        assert count == 1, key
    names = {}
    for example in PYTHON.findall(text):
        exec(compile(example, "FROM_MASK_RCNN.md", "exec"), names)
    assert names["cfg"].MODEL.KNET.NUM_THING_CLASSES == 4
    for name in ("model_final", "my_loop"):
        predictor = knet_d2.load(f"output/mine/{name}.pth")
        assert predictor.classes.names == list(THING_CLASSES)
    for key, value in predictor.model.state_dict().items():
        assert torch.equal(value, names["model"].state_dict()[key])  # the loop's weights are those of its file
    ours, detectron2s = [float(x) for x in capsys.readouterr().out.splitlines() if re.fullmatch(r"[\d.]+", x)][-2:]
    assert ours == pytest.approx(detectron2s)
    assert len(names["lazy_model"].sem_seg_head.instance_kernels.weight) == 50
    assert Path("output/mine/model.onnx").stat().st_size > 1000 and Path("output/mine/new.png").exists()


def test_nothing_is_found(tmp_path, monkeypatch, capsys):
    """Means of the first and of the last two of ten lines; lines of evaluations do not count."""
    (tmp_path / "output" / "my_photos").mkdir(parents=True)
    rows = [{"iteration": i, "total_loss": 10.0 - i, "loss_mask_s0": 3.0, "lr": 0.1} for i in range(10)]
    rows.append({"iteration": 9, "segm/AP": 1.0})
    (tmp_path / "output" / "my_photos" / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    (example,) = PYTHON.findall((DOCS / "NOTHING_IS_FOUND.md").read_text())
    exec(compile(example, "NOTHING_IS_FOUND.md", "exec"), {})
    assert [x.split() for x in capsys.readouterr().out.splitlines()] == [
        ["loss_mask_s0", "3.000", "->", "3.000"],
        ["total_loss", "9.500", "->", "1.500"],
    ]


# A small model and small images for two iterations, from random weights
NOTEBOOK = {
    **{"MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu", "MODEL.KNET.NUM_KERNELS": 5, "MODEL.KNET.NUM_STAGES": 1},
    **{"INPUT.MIN_SIZE_TRAIN": "(64, 64)", "INPUT.MIN_SIZE_TEST": 64, "DATALOADER.NUM_WORKERS": 0},
    **{"SOLVER.MAX_ITER": 2, "SOLVER.IMS_PER_BATCH": 2, "TEST.EVAL_PERIOD": 2, "TEST.NUM_PICTURES": 0},
    **{"TEST.REPORT": False, "MODEL.PIXEL_MEAN": "[127.0, 127.0, 127.0]", "MODEL.PIXEL_STD": "[128.0, 128.0, 128.0]"},
}


def test_notebook(tmp_path, monkeypatch, capsys):
    """Cells in their order; commands run in this process, and what installs and exports is left out."""
    pytest.importorskip("timm")
    exported = []
    monkeypatch.setattr("knet_d2.programs.export_model.main", lambda args: exported.extend(args.outputs))
    for name in ("configs", "demo"):
        (tmp_path / name).symlink_to(DOCS.parent / name)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((DOCS.parent / "demo" / "fine_tuning.ipynb").read_text())
    assert notebook["nbformat"] == 4
    names = {}
    for cell in (x for x in notebook["cells"] if x["cell_type"] == "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        source = "".join(cell["source"])
        for line in re.findall(r"^[!%](.*)", source, re.MULTILINE):
            words = shlex.split(line, posix=True)
            if words[0] == "knet":
                options = [str(x) for pair in NOTEBOOK.items() for x in pair] if words[1] == "train" else []
                assert knet_command.main([*words[1:], *options]) == 0
            else:
                assert words[0] in ("git", "cd", "pip") or words[:3] == ["python", "-m", "knet_d2.install_detectron2"]
        exec(compile(re.sub(r"^[!%].*", "", source, flags=re.MULTILINE), "notebook", "exec"), names)
    assert set(names["predictor"].classes.names) == {"date", "fig", "hazelnut"}
    assert names["prediction"]._repr_png_().startswith(b"\x89PNG")
    assert Path("output/fruits/photo.png").exists() and exported == ["output/fruits/model.onnx"]
