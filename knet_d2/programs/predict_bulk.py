"""Predict many images in shards, by one process or many; started again after it was killed, it continues.

    %(prog)s model.pth --input photos --output results
    torchrun --nproc-per-node 4 -m knet_d2 predict_bulk model.pth --input list.txt --output results
    sbatch --array=0-9 --wrap "%(prog)s model.pth --input list.txt --output results"
    %(prog)s model.pth --input list.txt --output results --ray 4

See knet docs DEPLOYMENT for the files that it writes.
"""

import argparse
import functools
import os

import torch
import tqdm

from ..data.files import ARRAY_TYPE, IMAGE_TYPES, files_below
from ..errors import ConfigError, DataError
from ..inference.bulk import BulkJob, Progress, Share, read_list, share_of
from ..inference.ray_bulk import run_on_ray
from ..inference.shard_files import FORMATS
from .arguments import MODEL_HELP, add_predictor_arguments, load_predictor


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help=f"{MODEL_HELP}; or an exported .onnx file")
    parser.add_argument("--input", required=True, help="a folder, with those in it, or a text file with a path a line")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for the results; all processes share it")
    parser.add_argument("--shard-size", type=int, default=100, metavar="N", help="images in a file of results")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images predicted at once")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="threads that read and resize images")
    parser.add_argument(
        "--share",
        metavar="I/N",
        help="every N-th shard, from the I-th on; default: as torchrun, srun or an array of SLURM jobs say, else all",
    )
    parser.add_argument("--ray", type=int, metavar="N", help="N processes of Ray, on RAY_ADDRESS or this machine")
    parser.add_argument("--format", choices=tuple(FORMATS), default="jsonl", help="of the files of results")
    add_predictor_arguments(parser, default_device="one GPU for each process of a machine")
    return parser


def find_inputs(path: str, output: str) -> list[str]:
    """The images below a folder, without those below the folder of results, or in a list.

    Raises:
        DataError: there is none.
    """
    if path.lower().endswith((*IMAGE_TYPES, ARRAY_TYPE)):
        return [path]
    if not os.path.isdir(path):
        return read_list(path)
    results = os.path.join(os.path.abspath(output), "")
    found = (file for _, file in files_below(path, (*IMAGE_TYPES, ARRAY_TYPE)))
    paths = [file for file in found if not os.path.abspath(file).startswith(results)]
    if not paths:
        raise DataError(f"{path}: no image there (files ending in {', '.join(IMAGE_TYPES)}).")
    return paths


def choose_share(text: str | None) -> Share:
    """The share that --share names, else that of the process.

    Raises:
        ConfigError: it is not as "0/4".
    """
    if text is None:
        return share_of(os.environ)
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--share {text}: write it as 0/4, the first of four shares, to 3/4, the last one.")
    return Share(int(index), int(count))


def choose_device(device: str | None) -> str | None:
    """--device, else the GPU of this process among those of its machine; None without several GPUs."""
    if device is None and torch.cuda.device_count() > 1:
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device


def open_job(args: argparse.Namespace) -> BulkJob:
    """Load the predictor of a job, and claim its folder.

    Raises:
        ConfigError, DataError: see :class:`BulkJob`, :func:`load` and :func:`find_inputs`.
    """
    predictor = load_predictor(args.weights, args, device=choose_device(args.device))
    return BulkJob(
        args.output,
        predictor,
        find_inputs(args.input, args.output),
        shard_size=args.shard_size,
        batch_size=args.batch_size,
        workers=args.workers,
        file_format=args.format,
    )


def main(args: argparse.Namespace) -> None:
    if args.ray is not None and args.share:
        raise ConfigError(f"--ray {args.ray}: Ray divides the shards itself. Leave out --share.")
    share = choose_share(args.share) if args.ray is None else Share()
    job = open_job(args)
    shards = range(share.first, job.num_shards, share.step)
    print(
        f"Share {share.first} of {share.step}: {len(shards)} of {job.num_shards} shards; {job.num_images} images in all"
    )
    if args.ray is None:
        steps = job.run(share)
    else:
        steps = run_on_ray(functools.partial(open_job, args), job.num_shards, args.ray)
    progress = Progress()
    for progress in tqdm.tqdm(steps, total=len(shards), unit="shard", disable=None):  # noqa: B007  the last one is printed
        pass
    print(f"{progress.predicted} images predicted ({progress.broken} of them broken), {progress.found} were there")
    if 0 < progress.predicted == progress.broken and not progress.found:
        raise DataError(f"--input {args.input}: no image could be predicted. The rows in {args.output} say why.")
