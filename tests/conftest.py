"""What every test needs."""

import logging
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes side by side, each with as many threads as there are cores, slow each other down ten times. PyTorch
    # reads this when it is imported, by the tests.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _log_reaches_caplog(caplog):
    """Let `caplog` listen to the package's logger instead of the root logger.

    Detectron2's `setup_logger`, which a program calls in this test or an earlier one, turns
    the propagation to the root logger off. Levels that a program has set, in an earlier test
    or in a fixture of a whole module, do not hold here.
    """
    logger = logging.getLogger("knet_d2")
    logger.setLevel(logging.NOTSET)
    logger.propagate = False
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
