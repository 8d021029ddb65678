"""Running the repository's programs with tiny models on a few generated images."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from endurance.runs import (  # noqa: E402, F401
    ROOT,
    SIZE,
    TINY_MODEL,
    Program,
    errors_in,
    first_difference,
    write_config,
)

from knet_d2.data.shapes.writer import write_shapes  # noqa: E402

NUM_IMAGES = 4


def load_program(path):
    """A program of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(str(folder), NUM_IMAGES, seed=5, size=SIZE)
    return folder
