"""What the documents say: commands parse, configs build, options and links exist, examples run."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from detectron2.config import get_cfg
from helpers import spread_scores, tiny_config, tiny_model

import knet_command
from knet_d2 import programs
from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.config import add_knet_config
from knet_d2.config.merging import merge_config
from knet_d2.data.custom import checked_entry
from knet_d2.engine import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [path for folder in (".", "docs", "demo", "checks") for path in sorted((ROOT / folder).glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"<<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)
# Pages whose examples are one program: tests/test_pages.py runs them
PROGRAMS = ("FROM_MASK_RCNN.md", "NOTHING_IS_FOUND.md")
# Files that a reader has, not this repository
READERS_FILES = ("my_", "output/", "test_dev", "...")
SHELL_WORDS = {
    "pip",
    "python3",
    "cat",
    "cd",
    "mv",
    "cp",
    "ln",
    "mkdir",
    "for",
    "while",
    "done",
    "zip",
    "unzip",
    "git",
    "sbatch",
    "hf",
    "export",
    "curl",
    "docker",
}


def blocks(language, documents=DOCUMENTS):
    return [
        pytest.param(text, id=f"{path.relative_to(ROOT)}-{number}")
        for path in documents
        for number, (found, text) in enumerate(FENCE.findall(path.read_text()))
        if found == language
    ]


def commands():
    """Every command line of every bash block, without comments, continuations and here-documents."""
    found = []
    for path in DOCUMENTS:
        for language, text in FENCE.findall(path.read_text()):
            if language != "bash":
                continue
            text = HEREDOC.sub("", text).replace("\\\n", " ")
            lines = (shlex.split(line, comments=True) for line in text.splitlines())
            found += [(path.relative_to(ROOT), line) for line in lines if line]
    return [pytest.param(line, id=f"{path}-{i}") for i, (path, line) in enumerate(found)]


class Parsed(Exception):
    """Raised to get the parsed arguments from a program without running it."""


def parse(program, arguments, monkeypatch):
    """Parse arguments with the parser of a program.

    Args:
        program: path of a script, or name of a module.
    """

    def wrap(original):
        def parse_args(parser, *args, **kwargs):
            raise Parsed(original(parser, *args, **kwargs))

        return parse_args

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, wrap(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", [str(program), *arguments])
    try:
        if Path(program).suffix == ".py":
            runpy.run_path(str(program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    except Parsed as parsed:
        return parsed.args[0]
    raise AssertionError(f"{program} has no parser")


@pytest.mark.parametrize("words", commands())
def test_command(words, monkeypatch):
    while "=" in words[0]:  # an environment variable
        words = words[1:]
    if words[0] in ("torchrun", "srun"):
        words = ["python", *words[next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py")) :]]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) - {word for word in words if "=" in word} <= set(targets)
        return
    if words[0] == "knet":
        if words[1] in ("doctor", "docs"):
            assert words[1] == "doctor" or knet_command.find_document(words[2])
            return
        words = ["python", "-m", "knet_d2", *words[1:]]
    if words[0] != "python":
        assert words[0] in SHELL_WORDS
        return
    words = words[1:]
    if words[0] == "-":  # a here-document
        return
    if words[0] == "-m":
        program, arguments = words[1], words[2:]
    else:
        program, arguments = ROOT / words[0], words[1:]
        assert program.is_file()
    if program in ("knet_d2.install_detectron2", "knet_d2.doctor") and not arguments:
        return  # they take none
    if program == "knet_d2":
        monkeypatch.setattr(programs, "run", lambda main, parser, arguments: parser.parse_args(arguments))
        args = programs.run_named("knet", arguments[0], arguments[1:])
    else:
        args = parse(program, arguments, monkeypatch)
    config_file = getattr(args, "config_file", None)
    if config_file and not config_file.startswith(READERS_FILES):
        load_config(str(ROOT / config_file), getattr(args, "opts", None) or [])


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml(text, tmp_path):
    content = yaml.safe_load(text)
    if isinstance(content, list):
        content = {"DATASETS": {"CUSTOM": content}}
    base = content.pop("_BASE_", None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    cfg = default_config()
    merge_config(cfg, str(ROOT / (base or "configs/shapes/panoptic.yaml")))
    merge_config(cfg, str(tmp_path / "config.yaml"))
    for entry in cfg.DATASETS.CUSTOM:
        checked_entry(entry, "the document")


@pytest.mark.parametrize("text", [*blocks("python"), *blocks("bash")])
def test_python_compiles(text):
    for code in HEREDOC.findall(text) if "<<" in text else [text]:
        if "import " in code:
            ast.parse(code)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_options_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name) if name else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target
    for key in re.findall(r"\b(?:MODEL|SOLVER|INPUT|DATASETS|DATALOADER|TEST)(?:\.[A-Z0-9_]+)+\b(?!\.\w)", text):
        node = default_config()
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def default_config():
    cfg = get_cfg()
    add_knet_config(cfg)
    return cfg


def test_every_option_of_ours_is_documented_with_its_default():
    theirs = leaves(get_cfg())
    ours = {key: value for key, value in leaves(default_config()).items() if key not in theirs}
    rows = re.findall(r"^\| `([A-Z0-9_.]+)` \| `(.+?)` \|", (ROOT / "docs" / "CONFIG.md").read_text(), re.MULTILINE)
    assert {key: ast.literal_eval(value) for key, value in rows} == ours


def leaves(node, prefix=""):
    found = {}
    for key, value in node.items():
        found.update(leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found


@pytest.mark.parametrize("text", blocks("python", [x for x in DOCUMENTS if x.name not in PROGRAMS]))
def test_examples_from_python_run(text, tmp_path, monkeypatch, capsys):
    """Examples of knet_d2.load, with a tiny model and small pictures under the names that they use."""
    if not any(word in text for word in ("knet_d2.load", "predictor", "prediction.")):
        pytest.skip("needs a download")
    ids = {"MODEL.KNET.THING_CATEGORY_IDS": [0, 1, 2], "MODEL.KNET.STUFF_CATEGORY_IDS": [3, 4]}
    options = {"INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 96, **ids}
    cfg = tiny_config("panoptic", options)
    model = spread_scores(tiny_model("panoptic", options).eval())
    for name in ("shapes_panoptic", "my_photos"):
        weights = tmp_path / "output" / name / "model_final.pth"
        weights.parent.mkdir(parents=True)
        save_weights(str(weights), model.state_dict(), describe_model(cfg))
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    for name in ("image.jpg", "photo.jpg", "map.tif", "photos/a.jpg"):
        cv2.imwrite(str(tmp_path / name), picture)
    writer = cv2.VideoWriter(str(tmp_path / "in.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (80, 60))
    writer.write(picture)
    writer.release()
    monkeypatch.chdir(tmp_path)
    before = "import cv2\nimport knet_d2\nimport numpy as np\nfrom PIL import Image\n"
    if "knet_d2.load" not in text:
        before += 'predictor = knet_d2.load("output/shapes_panoptic/model_final.pth")\n'
        before += 'prediction = predictor("photo.jpg")\n'
    exec(compile(before + text, "document", "exec"), {})
    if "print" in text:
        assert capsys.readouterr().out
