"""Running the repository's programs with tiny models on a few generated images."""

import pytest

from checks.runs import (  # noqa: F401
    ROOT,
    SIZE,
    TINY_MODEL,
    Program,
    errors_in,
    first_difference,
    write_config,
)
from knet_d2.data.shapes.writer import write_shapes

NUM_IMAGES = 4


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(str(folder), NUM_IMAGES, seed=5, size=SIZE)
    return folder
