"""Experiment trackers that get the metrics and validation pictures of a run: Weights & Biases, MLflow, Aim.

Their packages are optional. Each is used with its own settings: WANDB_MODE, MLFLOW_TRACKING_URI, AIM_REPO and so on.
"""

import importlib.util
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..checkpoint import write_atomically
from ..errors import ConfigError
from ..setup.compat import stored_images
from .writers import WINDOW

logger = logging.getLogger(__name__)

# File in OUTPUT_DIR with the tracker's id of the run, by tracker; a resumed run continues there.
RUN_IDS = "trackers.json"
_PROJECT = "knet_d2"


class Tracker(Protocol):
    """A run of an experiment tracker.

    Attributes:
        run_id: by which the tracker finds this run again.
    """

    run_id: str

    def log(self, metrics: Mapping[str, float], iteration: int) -> None: ...

    def log_picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Log a picture, uint8 RGB [H, W, 3]."""

    def close(self) -> None: ...


class WandbTracker:
    """A run of Weights & Biases."""

    def __init__(self, name: str, folder: str, config: dict[str, Any], run_id: str | None) -> None:
        import wandb

        self._wandb = wandb
        resume = None if run_id is None else "allow"
        self._run = wandb.init(project=_PROJECT, name=name, dir=folder, config=config, id=run_id, resume=resume)
        self.run_id: str = self._run.id

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(metrics), step=iteration)

    def log_picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        self._run.log({name: self._wandb.Image(picture)}, step=iteration)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow."""

    def __init__(self, name: str, folder: str, config: dict[str, Any], run_id: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        if run_id is None and "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(_PROJECT)
        self.run_id: str = mlflow.start_run(run_id=run_id, run_name=name).info.run_id
        mlflow.log_dict(config, "config.yaml")

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        self._mlflow.log_metrics({_mlflow_name(name): value for name, value in metrics.items()}, step=iteration)

    def log_picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        self._mlflow.log_image(picture, f"{_mlflow_name(name)}_{iteration:07d}.png")

    def close(self) -> None:
        self._mlflow.end_run()


def _mlflow_name(name: str) -> str:
    """Replace the characters that MLflow refuses, which names of classes and files can have."""
    return re.sub(r"[^\w\-. /]|\.\.", "_", name)


class AimTracker:
    """A run of Aim."""

    def __init__(self, name: str, folder: str, config: dict[str, Any], run_id: str | None) -> None:
        import aim

        self._aim = aim
        self._run = aim.Run(run_hash=run_id, experiment=_PROJECT)
        self._run.name = name
        self._run["config"] = config
        self.run_id: str = self._run.hash

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        for name, value in metrics.items():
            self._run.track(value, name=name, step=iteration)

    def log_picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        self._run.track(self._aim.Image(picture), name=name, step=iteration)

    def close(self) -> None:
        self._run.close()


# Value in SOLVER.TRACKERS, which is also the name of the package
TRACKERS: dict[str, Callable[[str, str, dict[str, Any], str | None], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "aim": AimTracker,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise a ConfigError unless all trackers are known and installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"SOLVER.TRACKERS = {list(names)}: {name!r} is unknown; use {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"SOLVER.TRACKERS = {list(names)}: needs the package {name}; python -m pip install {name}."
            )


class TrackerWriter(EventWriter):
    """Writes scalars and pictures to a tracker. If the tracker fails, training continues without it."""

    def __init__(self, cfg: CfgNode, name: str, start_iter: int = 0):
        """
        Args:
            cfg: the config of the run; the tracker shows it.
            name: key of TRACKERS.
            start_iter: first iteration; values of earlier ones were written before a resume.
        """
        self._name, self._last_written = name, start_iter - 1
        self._tracker: Tracker | None = None
        path = os.path.join(cfg.OUTPUT_DIR, RUN_IDS)
        ids = _read_ids(path)
        title = os.path.basename(os.path.abspath(cfg.OUTPUT_DIR))
        self._guard(lambda: self._open(path, ids, (title, cfg.OUTPUT_DIR, yaml.safe_load(cfg.dump()))))

    def _open(self, path: str, ids: dict[str, str], arguments: tuple[str, str, dict[str, Any]]) -> None:
        self._tracker = TRACKERS[self._name](*arguments, ids.get(self._name))
        ids = {**ids, self._name: self._tracker.run_id}
        write_atomically(path, lambda f: json.dump(ids, f), mode="w")

    def write(self) -> None:
        storage = get_event_storage()
        new = {
            name: float(value)
            for name, (value, iteration) in storage.latest_with_smoothing_hint(WINDOW).items()
            if iteration > self._last_written and math.isfinite(value)
        }
        pictures = stored_images(storage)
        self._last_written = storage.iter
        self._guard(lambda: self._send(new, pictures, storage.iter))

    def _send(self, metrics: dict[str, float], pictures: list[tuple[str, Any, int]], iteration: int) -> None:
        if self._tracker is None:
            return
        for name, picture, _ in pictures:
            self._tracker.log_picture(name, np.asarray(picture).transpose(1, 2, 0), iteration)
        self._tracker.log(metrics, iteration)

    def close(self) -> None:
        if self._tracker is not None:
            self._guard(self._tracker.close)

    def _guard(self, call: Callable[[], None]) -> None:
        """Call; the service of a tracker, or its network, may fail in any way, and must not end a training run."""
        try:
            call()
        except Exception as error:
            logger.warning(
                "%s fails, so this run continues without it: %s: %s", self._name, type(error).__name__, error
            )
            self._tracker = None


def _read_ids(path: str) -> dict[str, str]:
    if not os.path.isfile(path):
        return {}
    with open(path) as f:
        return json.load(f)
