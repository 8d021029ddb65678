"""docs/API.md: every public name that it lists can be imported, and every program that it lists can be started."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "API.md").read_text()
ROWS = re.findall(r"^\| `([\w.]+)` \| (`.+`) \|$", PAGE, re.MULTILINE)
NAMES = [(module, name) for module, names in ROWS for name in re.findall(r"`(\w+)`", names)]
PROGRAMS = re.findall(r"`([\w.]+)`", re.search(r"^Programs that `python -m` starts: (.+)$", PAGE, re.MULTILINE)[1])


@pytest.mark.parametrize("module, name", NAMES, ids=".".join)
def test_name(module, name):
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("module", PROGRAMS)
def test_program(module):
    spec = importlib.util.find_spec(module)
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert 'if __name__ == "__main__":' in Path(spec.origin).read_text()


def test_the_page_has_what_was_documented_from_the_start():
    """The import paths that the first version documented still work."""
    earlier = {
        ("knet_d2", "load"),
        ("knet_d2.classes", "class_table"),
        ("knet_d2.visualization", "draw_prediction"),
        ("knet_d2.engine", "Predictor"),
        ("knet_d2.engine", "load_config"),
        ("knet_d2.data", "register_custom_datasets"),
        ("knet_d2.data", "resolve_classes"),
        ("knet_d2.model_zoo", "get"),
    }
    assert earlier <= set(NAMES)
    assert {"knet_d2.doctor", "knet_d2.install_detectron2", "knet_d2.data.shapes", "knet_d2.engine.replay"} <= {
        *PROGRAMS
    }
