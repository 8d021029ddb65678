"""All programs end in the same way: with an exit code, and one line for an error that the user can fix."""

import argparse
import errno
import importlib

import pytest
from program_helpers import shapes  # noqa: F401
from test_programs import models  # noqa: F401

from knet_d2.errors import DataError
from knet_d2.programs import NAMES, run, run_program


@pytest.mark.parametrize(
    "outcome, code, message",
    [
        (None, 0, ""),
        (3, 3, ""),
        (DataError("a.jpg: is empty."), 1, "Error: a.jpg: is empty.\n"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 1, "Error: a/b: Not a directory.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "Error: No space left on device.\n"),
        (KeyboardInterrupt(), 130, "Ended by Ctrl-C.\n"),
    ],
)
def test_exit_code_and_message(outcome, code, message, capsys):
    def main(args):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    assert run(main, argparse.ArgumentParser(), []) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "Connection reset"), ValueError("a bug")])
def test_what_nobody_can_mend_keeps_its_traceback(error):
    def main(args):
        raise error

    with pytest.raises(type(error)):
        run(main, argparse.ArgumentParser(), [])


@pytest.mark.parametrize("name", NAMES)
def test_every_program_has_a_parser_and_a_main(name):
    program = importlib.import_module(f"knet_d2.programs.{name}")
    assert isinstance(program.get_parser(), argparse.ArgumentParser) and callable(program.main)


PLACES = {
    "demo": "--config-file {config} --input {image} --output {bad} --opts MODEL.WEIGHTS {weights}",
    "compare": "--config-file {config} --output {bad}.png --number 1 --opts MODEL.WEIGHTS {weights}",
    "check_dataset": "--config-file {config} --output {bad}",
    "convert_checkpoint": "{weights} {bad}.pth --config {config}",
    "predict_bulk": "{weights} --input {image} --output {bad} --config-file {config}",
    "export_model": "{weights} {bad}.pt2 --config-file {config}",
    "visualize_kernels": "{weights} --images {image} --average {bad}.jpg --config-file {config}",
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_can_t_be_written_to_is_one_line(name, tmp_path, models, shapes, capsys):  # noqa: F811
    (tmp_path / "file").touch()
    config, weights = models["instance"]
    places = {"config": config, "weights": weights, "image": shapes / "images" / "000000.jpg"}
    assert run_program(name, PLACES[name].format(bad=tmp_path / "file" / "x", **places).split()) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and str(tmp_path / "file") in lines[0]
