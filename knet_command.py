"""The command ``knet`` of an installed package; knet_d2.programs.command says what it does.

It stands outside of the package, so that ``knet --help`` does not import torch and Detectron2.
"""

import importlib.metadata
import sys
from collections.abc import Sequence

HELP = """usage: knet COMMAND ...

  train     train a model: knet train --data my_photos --task instance
  eval      evaluate a training run: knet eval output/my_photos
  predict   segment images: knet predict output/my_photos photo.jpg --output pictures
  check     check annotations: knet check --data my_photos
  export    write an ONNX or torch.export file: knet export output/my_photos model.onnx
  annotate  write predictions as files of a label tool, to correct them: knet annotate output/my_photos new_photos ...
  doctor    say what is installed and what is missing

knet COMMAND --help lists the options of a command; knet --version prints the version. Other programs have the names of
python -m knet_d2 --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if words[0] == "--version":
        print(importlib.metadata.version("knet_d2"))
        return 0
    if words[0] == "doctor":  # works without Detectron2
        from knet_d2.setup.doctor import main as examine

        return examine(words[1:])
    from knet_d2.programs.command import run_command

    return run_command(words[0], words[1:])


if __name__ == "__main__":
    sys.exit(main())
