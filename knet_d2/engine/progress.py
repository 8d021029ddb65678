"""What a training run shows: the log of a run, and a progress bar on a terminal."""

import contextlib
import logging
import re
import sys

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import setup_logger
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .writers import WINDOW, time_left

logger = logging.getLogger(__name__)

# Name of each logger that is shown -> its short name on the console
_LOGGERS = {"fvcore": "fvcore", "detectron2": "d2", "knet_d2": "knet"}
# First words of Detectron2's messages that only programs read, or only those who develop it
_LOG_ONLY = ("copypaste: ", "Evaluation results for ", "Serializing ", "Serialized ")
_COLOR_CODE = re.compile(r"\x1b\[[0-9;]*m")
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"


class PlainFormatter(logging.Formatter):
    """Formats lines of a log file: without the colours that some messages have."""

    def format(self, record: logging.LogRecord) -> str:
        return _COLOR_CODE.sub("", super().format(record))


def start_log(folder: str) -> None:
    """Show messages on the console, and write them to log.txt in a folder, with what only helps to find errors."""
    rank = comm.get_rank()
    plain = PlainFormatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S")
    for name, short in _LOGGERS.items():
        color = sys.stdout.isatty()
        logger = setup_logger(folder, distributed_rank=rank, color=color, name=name, abbrev_name=short)
        for handler in logger.handlers:
            if not isinstance(handler, logging.StreamHandler):
                continue
            if handler.stream is sys.stdout:
                _show_what_users_need(handler)
            else:
                handler.setFormatter(plain)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no GPU is nothing to warn of
    logging.getLogger(__name__).debug("Environment:\n%s", collect_env_info())


def _show_what_users_need(console: logging.Handler) -> None:
    """Leave to log.txt what only helps to find errors or to count results."""
    console.setLevel(logging.INFO)
    console.addFilter(lambda record: not str(record.msg).startswith(_LOG_ONLY))


class ProgressBar(HookBase):
    """Shows the progress of training on a terminal: images per second, time left, loss and the last main metric."""

    def __init__(self, images_per_iteration: int, metric: str):
        """
        Args:
            images_per_iteration: number of images of a batch of all processes.
            metric: name of the main metric, such as "segm/AP".
        """
        self._images, self._metric = images_per_iteration, metric
        self._open = contextlib.ExitStack()

    def before_train(self) -> None:
        first, total = self.trainer.start_iter, self.trainer.max_iter
        # Messages are written above the bar.
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        self._open.enter_context(logging_redirect_tqdm(loggers))
        for handler in (x for logger in loggers for x in logger.handlers):
            if getattr(handler, "stream", None) is sys.stdout:
                _show_what_users_need(handler)
        bar = tqdm(total=total, initial=first, bar_format=_BAR, dynamic_ncols=True, file=sys.stderr)
        self._bar = self._open.enter_context(bar)

    def after_step(self) -> None:
        self._bar.set_postfix_str(self._text(), refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        self._open.close()

    def _text(self) -> str:
        storage = self.trainer.storage
        known, parts = storage.histories(), []
        if "time" in known and known["time"].median(WINDOW) > 0:
            parts.append(f"{self._images / known['time'].median(WINDOW):.1f} images/s")
        parts.append(f"{time_left(storage, self.trainer.max_iter)} left")
        for name, title in (("total_loss", "loss"), (self._metric, self._metric)):
            if name in known:
                parts.append(f"{title} {known[name].latest():.3g}")
        return ", ".join(parts)


class FirstEstimate(HookBase):
    """Logs after three iterations how long the run takes, since the next line may come much later."""

    def after_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter + 2:  # the first one that IterationTimer times
            storage = self.trainer.storage
            seconds, left = storage.history("time").latest(), time_left(storage, self.trainer.max_iter)
            logger.info("%.2g s for an iteration: about %s for the rest, without evaluations.", seconds, left)
