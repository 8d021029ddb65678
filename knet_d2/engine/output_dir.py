"""OUTPUT_DIR: the config, the seed and the log files of a run, and the lock that keeps a second run out."""

import argparse
import errno
import logging
import os
import re
import socket
from typing import TextIO

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from ..config.merging import load_config
from ..config.unread import warn_of_unread_options
from ..errors import ConfigError
from .progress import start_log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_locks: dict[str, TextIO] = {}


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of a training or evaluation run, as the arguments of Detectron2's command line give it.

    Also starts the log files in OUTPUT_DIR and saves the resolved config there, that of an evaluation in the folder
    inference, so that its options do not become those of the training run. The config of a run to be resumed stays
    until :func:`save_config` replaces it, since the trainer may refuse what differs.
    """
    cfg = load_config(args.config_file, args.opts)
    cfg.SEED = resolve_seed(cfg, resume=args.resume)
    cfg.freeze()
    folder = os.path.join(cfg.OUTPUT_DIR, "inference") if args.eval_only else cfg.OUTPUT_DIR
    os.makedirs(folder or ".", exist_ok=True)
    if not args.eval_only:
        lock_output_dir(cfg.OUTPUT_DIR)
    earlier = _saved_config(cfg) if args.resume and not args.eval_only else ""
    start_log(cfg.OUTPUT_DIR)
    logger.debug("Arguments: %s", args)
    path = save_config(cfg, folder, earlier)
    logger.info("The config of this run is in %s.", path)
    seed_all_rng(cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    warn_of_unread_options(cfg)
    return cfg


def save_config(cfg: CfgNode, folder: str, text: str = "") -> str:
    """Write a config, or ``text`` in its place, into config.yaml, on the main process; returns the path."""
    path = os.path.join(folder, "config.yaml")
    if comm.is_main_process():
        with open(path, "w") as f:
            f.write(text or cfg.dump())
    return path


def _saved_config(cfg: CfgNode) -> str:
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if not os.path.isfile(path):
        return ""
    with open(path) as f:
        return f.read()


def resolve_seed(cfg: CfgNode, resume: bool = False) -> int:
    """SEED, or one that is drawn when it is negative; a resumed run keeps the one in OUTPUT_DIR/config.yaml."""
    if cfg.SEED >= 0:
        return cfg.SEED
    match = re.search(r"^SEED: (\d+)$", _saved_config(cfg), flags=re.MULTILINE) if resume else None
    if match:
        return int(match.group(1))
    return comm.shared_random_seed()


def lock_output_dir(folder: str) -> None:
    """Let no other process train in an existing folder until this one ends or releases it; on the main process.

    The lock is the operating system's: it ends with the process, however that ends, and children don't inherit it.
    Where a file system has no locks, nothing is locked.

    Raises:
        ConfigError: names the process that trains there.
    """
    folder = os.path.realpath(folder)
    if fcntl is None or folder in _locks or not comm.is_main_process():
        return
    file = open(os.path.join(folder, "training.lock"), "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read()
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        raise ConfigError(
            f"OUTPUT_DIR = {folder}: {holder or 'another process'} trains there. End it, or choose another OUTPUT_DIR."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[folder] = file


def release_output_dir(folder: str) -> None:
    """Let others train in a folder again."""
    file = _locks.pop(os.path.realpath(folder), None)
    if file is not None:
        file.close()
