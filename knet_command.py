"""The command ``knet`` of an installed package: ``knet NAME ...`` starts a program of knet_d2.programs.

It stands outside of the package, so that ``knet --help`` and ``knet docs`` do not import torch and Detectron2.
"""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HELP = """usage: knet COMMAND ...

  train     train a model: knet train --data my_photos --task instance
  eval      evaluate a training run: knet eval output/my_photos
  predict   segment images: knet predict output/my_photos photo.jpg --output picture.png
  check     check annotations: knet check --data my_photos
  export    write an ONNX or torch.export file: knet export output/my_photos model.onnx
  annotate  write predictions as files of a label tool, to correct them: knet annotate output/my_photos new_photos ...
  doctor    say what is installed and what is missing
  docs      print a page of the documentation: knet docs DATASETS

knet COMMAND --help lists the options of a command; knet --version prints the version. python -m knet_d2 --help lists
further programs, which knet starts, too.
"""


def documents() -> dict[str, Path]:
    """The pages of the documentation by name: from the package of a wheel, or from beside the package in a checkout."""
    package = Path(importlib.util.find_spec("knet_d2").origin).parent
    folders = (package / "docs", package.parent / "docs")
    folder = next(x for x in folders if x.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.md"))}


def print_document(names: Sequence[str]) -> int:
    """Print a page, or without a name the list of pages; returns the exit code."""
    pages = documents()
    if not names or names[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:18}{path}" for name, path in pages.items())
        print(f"usage: knet docs PAGE\n\n{listed}", flush=True)
        return 0
    if names[0].upper() not in pages:
        raise SystemExit(f"knet docs: there is no page {names[0]!r}; the pages are {', '.join(pages)}.")
    print(pages[names[0].upper()].read_text(encoding="utf-8"), flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if words[0] == "--version":
        print(importlib.metadata.version("knet_d2"))
        return 0
    if words[0] == "docs":
        try:
            return print_document(words[1:])
        except BrokenPipeError:  # "knet docs FAQ | head"; Python would fail again when it closes the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
    try:
        if words[0] == "doctor":  # works without Detectron2
            from knet_d2.setup.doctor import main as examine

            return examine(words[1:])
        from knet_d2.programs import run_named

        return run_named("knet", words[0], words[1:])
    except KeyboardInterrupt:  # during the imports, which take seconds
        return 130


if __name__ == "__main__":
    sys.exit(main())
