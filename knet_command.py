"""The command ``knet`` of an installed package: ``knet NAME ...`` starts a program of knet_d2.programs.

It stands outside of the package, so that ``knet --help`` and ``knet docs`` do not import torch and Detectron2.
"""

import importlib.metadata
import importlib.util
import os
import re
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

Less often used:

  demo, web, serve                         Detectron2's demo, a web page, an HTTP service
  predict_bulk, cut_tiles                  millions of images, huge images
  convert_dataset, convert_checkpoint      annotations to COCO, weights to a file or folder to share
  compare, visualize_kernels               ground truth beside prediction, what kernels have learned
  compare_training, verify_zoo             training runs of several configs, official checkpoints
  benchmark, analyze_model, device_report  speed, size, what works on a GPU

knet COMMAND --help lists the options of a command; knet --version prints the version.
"""


# Folders of pages beside docs/ in a checkout; setup.py lays them into the same folder of a wheel
PAGES_BESIDE = ("*.md", "demo/**/*.md")


def documents() -> dict[str, Path]:
    """The pages of the documentation by name, such as DATASETS, README or demo/README.

    They are in the package of a wheel; in a checkout in docs/, and beside it.
    """
    package = Path(importlib.util.find_spec("knet_d2").origin).parent
    in_wheel = package / "docs"
    patterns = {in_wheel: ["**/*.md"]}
    if not in_wheel.is_dir():
        patterns = {package.parent / "docs": ["**/*.md"], package.parent: [*PAGES_BESIDE]}
    pages = ((folder, path) for folder in patterns for pattern in patterns[folder] for path in folder.glob(pattern))
    return dict(sorted((path.relative_to(folder).with_suffix("").as_posix(), path) for folder, path in pages))


def find_document(name: str) -> Path | None:
    """The page of a name, in any case; or of a link between pages, such as ../demo/README.md#results-as-json."""
    wanted = re.sub(r"^((\.\.?|docs)/)+|#.*$|\.md(?=#|$)", "", name, flags=re.IGNORECASE).lower()
    return next((path for page, path in documents().items() if page.lower() == wanted), None)


def print_document(names: Sequence[str]) -> int:
    """Print a page, or without a name the list of pages; returns the exit code."""
    if not names or names[0] in ("-h", "--help"):
        pages = documents()
        width = max(map(len, pages)) + 2
        listed = "\n".join(f"  {name:{width}}{path}" for name, path in pages.items())
        print(f"usage: knet docs PAGE\n\n{listed}", flush=True)
        return 0
    path = find_document(names[0])
    if path is None:
        raise SystemExit(f"knet docs: there is no page {names[0]!r}; the pages are {', '.join(documents())}.")
    print(path.read_text(encoding="utf-8"), flush=True)
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
    except ImportError as error:
        if error.name != "detectron2":
            raise
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
