"""The programs. Each module has ``get_parser()`` and ``main(args)``, which returns an exit code, or None for success.

``train_net.py`` and the scripts in ``demo/`` and ``tools/`` start them; an installed package starts them by
``knet NAME``. In the texts of ``--help``, ``%(prog)s`` stands for that.
"""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from detectron2.utils.logger import setup_logger

from ..errors import KNetError

# Errors of writing to an open file; they do not contain the file's name.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

NAMES = (
    "train",
    "eval",
    "predict",
    "demo",
    "annotate",
    "compare",
    "web",
    "serve",
    "predict_bulk",
    "check_dataset",
    "convert_dataset",
    "cut_tiles",
    "export_model",
    "convert_checkpoint",
    "visualize_kernels",
    "benchmark",
    "device_report",
    "analyze_model",
    "compare_training",
    "verify_zoo",
)

# They set up logging in each of their processes
_OWN_LOGS = ("train", "eval", "compare_training", "verify_zoo")
# Short names of the command knet
_ALIASES = {"check": "check_dataset", "export": "export_model"}


def run_named(starter: str, name: str, arguments: Sequence[str]) -> int:
    """Run a program by its name or short name; returns the exit code.

    Args:
        starter: command that --help shows before the name.

    Raises:
        SystemExit: there is no such program.
    """
    program = _ALIASES.get(name, name)
    if program not in NAMES:
        raise SystemExit(f"{starter}: there is no command {name!r}; {starter} --help lists them.")
    return run_program(program, arguments, f"{starter} {name}")


def run_program(name: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one of the programs NAMES.

    Args:
        name: name of the program.
        arguments: command line arguments; None: those of this process.
        prog: command that --help shows; None: name of the script.

    Returns:
        The exit code.
    """
    program = importlib.import_module(f"{__name__}.{name}")
    if name not in _OWN_LOGS:
        setup_logger(name="fvcore")
        setup_logger(name="knet_d2", abbrev_name="knet")
    parser = program.get_parser()
    if prog is not None:
        parser.prog = prog
    return run(program.main, parser, arguments)


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line and run ``main(args)``; returns the exit code, see :func:`guarded`.

    Images and files may stand on both sides of options, except where KEY VALUE pairs without --opts end the line.
    """
    args = parse(parser, sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: main(args))


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; options such as --resume may also stand behind the KEY VALUE pairs."""
    args = _parse_in_order(parser, words)
    opts = getattr(args, "opts", [])  # argparse puts all that follows the first pair there
    end = next((i for i in range(0, len(opts), 2) if opts[i].startswith("-")), len(opts))
    if end == len(opts):
        return args
    return _parse_in_order(parser, [*opts[end:], *words[: len(words) - len(opts)], *opts[:end]])


def _parse_in_order(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_intermixed_args(words)
    except TypeError:  # argparse can't do that with nargs=REMAINDER
        return parser.parse_args(words)


def guarded(main: Callable[[], int | None]) -> int:
    """Run ``main``.

    Returns:
        The exit code: the result of ``main`` (None counts as 0); 1 after an error that the user can fix, which is
        printed in one line; 130 after Ctrl-C.
    """
    try:
        return main() or 0
    except KNetError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:  # an error of a connection, not of a file
            raise
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        print(f"Error: {place}{error.strerror}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Ended by Ctrl-C.", file=sys.stderr)
        return 130
