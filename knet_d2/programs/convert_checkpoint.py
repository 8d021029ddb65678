"""Convert an official K-Net checkpoint (OpenMMLab) or one of a training run to a file to share: .pth or .safetensors.

MODEL.WEIGHTS also reads the official files. Converted files are smaller, because they have no optimiser state. They
use our parameter names, and contain their config and class names, so knet_d2.load needs no other file.
"""

import argparse
import os

import torch

from ..checkpoint import LoadReport, as_checkpoint, describe_model, has_description, load_file, read_description
from ..checkpoint.address import weights_file
from ..checkpoint.hub import CardFacts, read_card_facts, write_hub_folder
from ..checkpoint.load_report import build_report, find_misfits, recognise
from ..checkpoint.saving import save_weights
from ..checkpoint.zoo import build_on_meta, fitting_entries, fitting_hint
from ..data.files import refuse_to_replace
from ..engine import load_config
from ..errors import CheckpointError
from ..model_zoo import get_config_file, names
from .arguments import add_opts


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="a weights file, folder of a training run, or name as lite0_fruits")
    parser.add_argument("output", help="the file to write: .pth or .safetensors; with --model-card a folder")
    parser.add_argument("--half", action="store_true", help="store the numbers in float16: half the size")
    parser.add_argument(
        "--model-card",
        metavar="YAML",
        help="write a folder for Hugging Face's hub: weights, config, classes and a card, of which this file states "
        f"{', '.join(CardFacts._fields)}",
    )
    parser.add_argument(
        "--config",
        metavar="NAME_OR_FILE",
        help="name in the model zoo, or a config file; default: the config in the checkpoint, or the config of the "
        "model zoo that fits it",
    )
    add_opts(parser)
    return parser


def find_config(path: str, state_dict: dict[str, torch.Tensor]) -> str:
    """Return the name of the model of the zoo that fits a checkpoint.

    Models that differ only in their training schedule are distinguished by the official name in the file name.

    Raises:
        CheckpointError: no model or several models fit; names them.
    """
    fitting = fitting_entries(recognise(state_dict, state_dict.keys()).translation.state_dict)
    named = [x for x in fitting if x.official_name and os.path.basename(path).startswith(x.official_name + "_")]
    candidates = named or fitting
    if len(candidates) == 1:
        return candidates[0].name
    if not candidates:
        raise CheckpointError(f"{path}: does not fit any model of the zoo. Give its config with --config FILE.")
    found = " or ".join(x.name for x in candidates)
    raise CheckpointError(f"{path}: fits {found}. Give one of them with --config NAME.")


def convert(
    path: str, config: str | None, opts: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, str], LoadReport]:
    """Convert a checkpoint; returns the parameters by our names, their description, and a report on each entry."""
    checkpoint = as_checkpoint(load_file(path), path)
    state_dict = checkpoint["model"]
    if config is None and not opts and has_description(checkpoint):
        config, metadata = "the config in it", checkpoint["metadata"]
        cfg = read_description(checkpoint, path).cfg
    else:
        config = config or find_config(path, state_dict)
        cfg = load_config(get_config_file(config) if config.removesuffix(".yaml") in names() else config, opts)
        metadata = describe_model(cfg)
    model_state = build_on_meta(cfg).state_dict()
    layout = recognise(state_dict, model_state)
    report = build_report(layout, state_dict, model_state)
    reasons = find_misfits(report, layout, partial=False)
    if reasons:
        hint = fitting_hint(layout.translation.state_dict) if layout.scope == "model" else ""
        raise CheckpointError(f"{path} ({layout.name}) does not fit {config}: {'; '.join(reasons)}.{hint}")
    loaded = set(report.loaded)
    converted = {name: value for name, value in layout.translation.state_dict.items() if name in loaded}
    return converted, {**metadata, "source": os.path.basename(path)}, report


def halve(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters with all floating-point numbers rounded to float16.

    Raises:
        CheckpointError: a number is too large for float16.
    """
    halved = {name: x.half() if x.is_floating_point() else x for name, x in state_dict.items()}
    for name, x in halved.items():
        if not x.isfinite().all():
            raise CheckpointError(f"--half: {name} has numbers above 65,504, the largest of float16. Leave --half out.")
    return halved


def main(args: argparse.Namespace) -> None:
    facts = read_card_facts(args.model_card) if args.model_card else None
    path = weights_file(args.input)
    refuse_to_replace([path], [args.output], args.output)
    converted, metadata, report = convert(path, args.config, tuple(args.opts))
    if args.half:
        converted = halve(converted)
    if facts is None:
        save_weights(args.output, converted, metadata)
    else:
        write_hub_folder(args.output, converted, metadata, facts)
    print(report.as_text())
    print(f"Wrote {args.output}")
