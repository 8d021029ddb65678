"""What a training run shows: its log file, the console, and the progress bar."""

import io
import logging
import re
import sys

import pytest
from detectron2.engine import default_argument_parser
from detectron2.utils.logger import _cached_log_stream
from toys import ToyEvaluator, assert_identical, metrics_of, reset_toys, run

from knet_d2.engine import setup
from knet_d2.engine.progress import PlainFormatter

LOGGERS = ("fvcore", "detectron2", "knet_d2")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def clean():
    """Loggers and toys as before."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(x.handlers[:], x.level, x.propagate) for x in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    _cached_log_stream.cache_clear()
    reset_toys()


def arguments(folder):
    options = ["MODEL.DEVICE", "cpu", "MODEL.KNET.NUM_THING_CLASSES", "1", "MODEL.KNET.NUM_STUFF_CLASSES", "1"]
    return default_argument_parser().parse_args([*options, "OUTPUT_DIR", str(folder), "SEED", "1"])


def trained(folder, monkeypatch, terminal):
    """A run with a log; returns what it writes to stdout and stderr, and its log."""
    out, err = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for name in LOGGERS:
        logging.getLogger(name).handlers = []
    setup(arguments(folder))
    ToyEvaluator.values = [12.5, 50.0]
    run(folder)
    monkeypatch.undo()
    for name in LOGGERS:
        for handler in logging.getLogger(name).handlers:
            handler.flush()
    return out.getvalue(), err.getvalue(), (folder / "log.txt").read_text()


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch):
    out, err, log = trained(tmp_path, monkeypatch, terminal=True)
    assert "23/23" in err and "images/s" in err and "left" in err and "loss" in err
    assert "panoptic_seg/PQ 12.5" in err
    assert not re.search(r"iter: \d+/23", out)  # the bar shows it
    assert "Best panoptic_seg/PQ so far: 12.500" in out
    assert re.search(r"DEBUG: eta: .*iter: 20/23", log) and "\x1b" not in log
    assert "copypaste" in log and "copypaste" not in out + err


def test_plain_lines_without_a_terminal(tmp_path, monkeypatch):
    out, err, log = trained(tmp_path, monkeypatch, terminal=False)
    assert err == "" and "\x1b" not in out + log and "\r" not in out
    assert re.search(r"eta: .*iter: 20/23", out)
    training_line = next(i for i, line in enumerate(log.splitlines()) if "iter: 5/23" in line)
    shown = next(i for i, line in enumerate(out.splitlines()) if "iter: 5/23" in line)
    assert shown < 15
    # The environment is in the file, the config is in config.yaml alone
    for title in ("Environment:", "Model:"):
        assert f"DEBUG: {title}" in log and title not in out
    assert training_line < 100
    assert "copypaste" in log and "copypaste" not in out
    assert "SOLVER:" not in log and "MAX_ITER" in (tmp_path / "config.yaml").read_text()


def test_the_bar_changes_nothing(tmp_path, monkeypatch):
    for terminal in (False, True):
        trained(tmp_path / str(terminal), monkeypatch, terminal)
    assert_identical(*(metrics_of(tmp_path / str(x)) for x in (False, True)))


def test_messages_of_libraries_lose_their_colours():
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "\x1b[36ma\x1b[0m b \x1b[1;31m%s\x1b[m", ("c",), None)
    assert PlainFormatter("%(message)s").format(record) == "a b c"


def test_a_log_tells_early_how_long_the_run_takes(tmp_path, monkeypatch):
    """20 iterations with one line in 5; on a terminal the bar tells it."""
    for terminal in (True, False):
        _, _, log = trained(tmp_path / str(terminal), monkeypatch, terminal=terminal)
        estimates = re.findall(r"([\d.e-]+) s for an iteration: about (\d+):(\d\d):(\d\d) for the rest", log)
        assert len(estimates) == (not terminal)
    assert log.index("s for an iteration") < log.index("iter: 5/")
