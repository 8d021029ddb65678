"""What every test needs."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _log_reaches_caplog():
    """Let the package's messages reach the root logger, where `caplog` listens.

    Detectron2's `setup_logger`, which a program calls that ran in this process before, turns
    propagation off for good.
    """
    logging.getLogger("knet_d2").propagate = True
