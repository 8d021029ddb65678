"""Compare the speed of K-Net and Detectron2's own models, in turns in one process, on the same generated images.

    %(prog)s --threads 2 --json benchmark_cpu.json
    %(prog)s --models coco/instance/knet_r50_fpn_1x.yaml,MODEL.KNET.NUM_KERNELS=50 \\
        coco/instance/knet_r50_fpn_1x.yaml,MODEL.KNET.NUM_KERNELS=400
    %(prog)s --device cuda --mode inference training --precision fp32 tf32 fp16 bf16 \\
        --compile no yes --batch 1 2 8 16 max --json benchmark_gpu.json

Every combination of mode, precision, compilation, size and batch is one comparison. The weights are random, but all
models find as many objects as trained ones: see knet_d2.programs.benchmark.filling and the column "finds". The
column "speed" is relative to the first model.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from ...errors import ConfigError
from ..arguments import size
from . import tables
from .filling import count_findings, fill
from .measure import (
    PRECISIONS,
    Run,
    count_operations,
    fits_in_memory,
    interleave,
    largest_batch,
    matrix_rate,
    measure_memory,
    precision,
)
from .models import BACKBONE, PEERS, BackboneOnly, Subject, build_subject
from .parts import mapper_seconds, measure_parts

INSTANCE, PANOPTIC = "coco/instance/knet_r50_fpn_1x.yaml", "coco/panoptic/knet_r50_fpn_1x.yaml"
MAX_BATCH = "max"


def _batch(text: str) -> "int | str":
    return text if text == MAX_BATCH else int(text)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [BACKBONE, INSTANCE, "mask_rcnn", "cascade_mask_rcnn", PANOPTIC, "panoptic_fpn"]
    names = ", ".join([*PEERS, BACKBONE])
    parser.add_argument("--models", nargs="+", default=default, help=f"{names}, or configs[,KEY=VALUE...]")
    parser.add_argument("--mode", nargs="+", default=["inference"], choices=["inference", "training"])
    parser.add_argument("--size", nargs="+", type=size, default=[(800, 1216)], help="sizes of the network's input, HxW")
    parser.add_argument("--output-size", type=size, help="size of the results, HxW; default: size of the input")
    parser.add_argument(
        "--batch", nargs="+", type=_batch, default=[1], help=f'numbers of images, or "{MAX_BATCH}" (CUDA)'
    )
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=list(PRECISIONS))
    parser.add_argument("--compile", nargs="+", default=["no"], choices=["no", "yes"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10, help="number of measurements; the table has the median")
    parser.add_argument("--warmup", type=int, default=2, help="number of runs before the measurements")
    parser.add_argument("--json", help="file for the raw results")
    return parser


def compare(args: argparse.Namespace, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure all models in one setting of mode, precision, compilation, size and batch."""
    device, train = torch.device(args.device), setting["mode"] == "training"
    output_size = args.output_size or setting["size"]
    subjects = [build_subject(name, args.device) for name in args.models]
    subjects = [subject for subject in subjects if not (train and isinstance(subject.model, BackboneOnly))]
    runs, rows = [], []
    with precision(setting["precision"], device):
        for subject in subjects:
            if not train:  # torch's counter fails without gradients for a parameter that is a module's argument
                subject.model.requires_grad_(False)
            run, findings = _prepare(subject, setting, output_size, train)
            runs.append(run)
            row = {**setting, "model": subject.name, "batch": len(run.inputs), "output": output_size}
            row["parameters"] = sum(p.numel() for p in subject.model.parameters())
            row["giga_multiply_adds"] = count_operations(run)
            row["findings"] = findings
            row["parts"], row["parts_peak_mib"] = measure_parts(run, device, args.rounds)
            if train and subject.is_knet and subject.model.bank.num_matched:
                row["parts"]["mapper, per image"] = mapper_seconds(subject.cfg, args.rounds)
            if setting["compiled"]:
                subject.compile()
            rows.append(row)
        seconds = interleave(runs, args.rounds, args.warmup, device)
        rate = matrix_rate(device, setting["precision"])
        for row, run, samples in zip(rows, runs, seconds):
            row["seconds"], row["all_seconds"] = median(samples), samples
            # In this order of operations, the speed of the first model is exactly 1.
            row["speed"] = (row["batch"] * rows[0]["seconds"]) / (rows[0]["batch"] * row["seconds"])
            row["share_of_matrix_rate"] = row["giga_multiply_adds"] / row["seconds"] / rate
            memory = measure_memory(run, device)
            row["peak_mib"], row["returned_mib"] = memory or (None, None)
    return rows


def _prepare(
    subject: Subject, setting: dict[str, Any], output_size: tuple[int, int], train: bool
) -> tuple[Run, dict[str, int]]:
    """Set the weights of a model; returns its run, and the counts of what it finds."""

    def make_run(batch: int) -> Run:
        return Run(subject, subject.inputs(setting["size"], batch, output_size), train=train)

    one = subject.inputs(setting["size"], 1, output_size)
    subject.model.eval()
    fill(subject, one)
    findings = count_findings(subject, one)
    batch = setting["batch"]
    return make_run(largest_batch(fits_in_memory(make_run)) if batch == MAX_BATCH else batch), findings


def settings(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield every combination of the options."""
    names = ("mode", "precision", "compiled", "size", "batch")
    compiled = [choice == "yes" for choice in args.compile]
    for values in itertools.product(args.mode, args.precision, compiled, args.size, args.batch):
        yield dict(zip(names, values))


def main(args: argparse.Namespace) -> None:
    if MAX_BATCH in args.batch and not args.device.startswith("cuda"):
        raise ConfigError(f"--batch {MAX_BATCH}: use --device cuda, because only CUDA reports when memory runs out.")
    if "fp16" in args.precision and args.device == "cpu":
        raise ConfigError("--precision fp16: use bf16 on the CPU, or --device cuda.")
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for setting in settings(args):
        rows += compare(args, setting)
        if args.json:
            tables.write_json(args.json, rows, torch.device(args.device))
        print(f"{setting} done", file=sys.stderr, flush=True)
    print(f"{tables.main_table(rows)}\n\n{tables.parts_table(rows)}")
