"""What every test needs."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _log_reaches_caplog(caplog):
    """Let `caplog` listen to the package's logger instead of the root logger.

    Detectron2's `setup_logger`, which a program calls in this test or an earlier one, turns
    the propagation to the root logger off. Levels that a program sets end with the test.
    """
    logger = logging.getLogger("knet_d2")
    level = logger.level
    logger.propagate = False
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
