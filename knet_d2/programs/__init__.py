"""The programs: every module has ``get_parser()`` and ``main(args)``, which returns an exit code or None for success.

``train_net.py`` and the scripts in ``demo/`` and ``tools/`` start them; an installed package starts them by
``python -m knet_d2 NAME``.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

NAMES = (
    "train",
    "demo",
    "compare",
    "web",
    "check_dataset",
    "export_model",
    "convert_checkpoint",
    "visualize_kernels",
    "benchmark",
    "analyze_model",
    "verify_zoo",
)


def run_program(name: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one of NAMES.

    Args:
        arguments: of the command line; None: those of this process.
        prog: the command that --help shows; None: the name of the script.

    Returns:
        The exit code.
    """
    program = importlib.import_module(f"{__name__}.{name}")
    parser = program.get_parser()
    if prog is not None:
        parser.prog = prog
    return run(program.main, parser, arguments)


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line, set up the loggers and run ``main(args)``.

    Returns:
        The exit code: what ``main`` returns (None counts as 0); 1 after a failure that a person can mend, which is
        printed in one line; 130 after Ctrl+C.
    """
    from detectron2.utils.logger import setup_logger

    from ..errors import KNetError

    args = parser.parse_args(arguments)
    if "num_gpus" not in args:  # programs that start processes set up the loggers in each of them
        setup_logger(name="fvcore")
        setup_logger(name="knet_d2", abbrev_name="knet")
    try:
        return main(args) or 0
    except (KNetError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
