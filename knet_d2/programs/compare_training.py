"""Train several configs with the same seeds, and compare their metrics by iteration and by time.

The first config is the baseline. With the same seed, all runs see the same images in the same order. Every evaluation
can be repeated under other options (--test), so that options of post-processing need no training run of their own.
Started again, the program continues where it was; runs that are complete are only read.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from tabulate import tabulate

from ..checkpoint import write_atomically
from ..config.merging import load_config, merge_config
from ..engine import Trainer, setup
from ..engine.output_dir import save_config
from ..errors import ConfigError, KNetError
from ..evaluation import best_metric
from ..modeling.postprocessing import PostProcessor

RECORDS = "comparison.jsonl"
# What was asked for in a run's folder: the config, and the options of each test
REQUEST = "comparison_request.json"
# What the options of a test can be: others would need a training run of their own
TEST_KEYS = ("MODEL.KNET.TEST.", "TEST.", "INPUT.", "DATASETS.TEST")
# Evaluation with the config's own options
PLAIN = "plain"


class Point(NamedTuple):
    """One evaluation of one run.

    Attributes:
        iteration: number of finished iterations.
        cpu_seconds, seconds: processor and wall clock time of these iterations, without evaluations.
        metrics: name of the test -> name of the metric -> value.
    """

    iteration: int
    cpu_seconds: float
    seconds: float
    metrics: dict[str, dict[str, float]]


class Clock(HookBase):
    """Sums up the time of all steps of a run, also across a resume."""

    def __init__(self, most_hours: float):
        self._most_hours = most_hours
        self.cpu_seconds = self.seconds = 0.0

    def before_step(self) -> None:
        self._start = time.process_time(), time.perf_counter()

    def after_step(self) -> None:
        self.cpu_seconds += time.process_time() - self._start[0]
        self.seconds += time.perf_counter() - self._start[1]
        if self.seconds > 3600 * self._most_hours:
            raise KNetError(
                f"--most-hours = {self._most_hours:g}: the run is at iteration {self.trainer.iter}. Raise the limit to "
                "continue, or give another --output and a lower SOLVER.MAX_ITER."
            )

    def state_dict(self) -> dict[str, float]:
        return {"cpu_seconds": self.cpu_seconds, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.cpu_seconds, self.seconds = state_dict["cpu_seconds"], state_dict["seconds"]


class ComparedTrainer(Trainer):
    """A trainer that also evaluates under other options, and records each evaluation with the time so far."""

    def __init__(self, cfg, tests: dict[str, list[str]], most_hours: float):
        self._clock = Clock(most_hours)
        self._tests = tests
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase]:
        return [self._clock, *super().build_hooks()]  # first, so that checkpoints contain the time of their iteration

    def evaluate(self) -> dict[str, Any]:
        """As the trainer's; the results are those of the config's own options."""
        results = super().evaluate()
        metrics = {PLAIN: flatten_results_dict(results)}
        model: Any = getattr(self.evaluated_model, "module", self.evaluated_model)  # not wrapped
        postprocessor: PostProcessor = model.postprocessor
        options = postprocessor.options
        for name, opts in self._tests.items():
            cfg = self.cfg.clone()
            cfg.defrost()
            merge_config(cfg, "", opts)
            postprocessor.options = PostProcessor(cfg, postprocessor.bank).options
            metrics[name] = flatten_results_dict(self.test(cfg, self.evaluated_model))
            postprocessor.options = options
        point = Point(self.iter + 1, self._clock.cpu_seconds, self._clock.seconds, metrics)
        with open(os.path.join(self.cfg.OUTPUT_DIR, RECORDS), "a") as f:
            f.write(json.dumps(point._asdict()) + "\n")
        return results


def read_points(folder: str) -> dict[int, Point]:
    """The evaluations of a run by their iteration; of one that was repeated after a resume, the last."""
    path = os.path.join(folder, RECORDS)
    if not os.path.isfile(path):
        return {}
    with open(path) as f:
        points = [Point(**json.loads(line)) for line in f if line.endswith("\n")]
    return {point.iteration: point for point in points}


def note_request(folder: str, cfg: CfgNode, tests: dict[str, list[str]]) -> None:
    """Note what a run's folder is for.

    Raises:
        ConfigError: it has a run of another config, or a test of this name with other options. Its figures would be
            taken for those of this run.
    """
    path = os.path.join(folder, REQUEST)
    lines = cfg.dump().splitlines()
    request: dict[str, Any] = {"config": lines, "tests": tests}
    if os.path.isfile(path):
        with open(path) as f:
            before = json.load(f)
        others = [line.strip() for line in before["config"] if line not in set(lines)]
        others += [f"--test {x}" for x, opts in before["tests"].items() if tests.get(x, opts) != opts]
        if others or len(before["config"]) != len(lines):
            raise ConfigError(
                f"{folder} has a run with other options ({', '.join(others[:3])}). Give another --output, or delete it."
            )
        request["tests"] = {**before["tests"], **tests}
    os.makedirs(folder, exist_ok=True)
    write_json(path, request)


def train(config: str, seed: int, folder: str, tests: dict[str, list[str]], most_hours: float, opts: list[str]) -> None:
    """Train one config from one seed in a folder, unless that is done."""
    # Without worker processes, whose time the clock would not see
    opts = [*opts, "SEED", str(seed), "OUTPUT_DIR", folder, "DATALOADER.NUM_WORKERS", "0"]
    asked = load_config(config, opts)
    note_request(folder, asked, tests)
    last = read_points(folder).get(asked.SOLVER.MAX_ITER)
    if last is not None and set(last.metrics) >= {PLAIN, *tests}:
        return
    cfg = setup(argparse.Namespace(config_file=config, opts=opts, resume=True, eval_only=False))
    trainer = ComparedTrainer(cfg, tests, most_hours)
    trainer.resume_or_load(resume=True)
    save_config(cfg, cfg.OUTPUT_DIR)
    if trainer.start_iter < cfg.SOLVER.MAX_ITER:
        trainer.train()
    else:  # a test was added to a run that is done
        trainer.iter = cfg.SOLVER.MAX_ITER - 1
        trainer.evaluate()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and standard error (nan for one value), and the number of values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {
        "mean": float(np.mean(values)),
        "deviation": deviation,
        "error": deviation / math.sqrt(len(values)),
        "count": len(values),
    }


def summarize(runs: dict[str, dict[int, dict[int, Point]]], metric: str) -> list[dict[str, Any]]:
    """One row for each series (config and test) and iteration, over the seeds that reached it.

    Args:
        runs: config -> seed -> iteration -> evaluation; the first config's plain test is the baseline.
        metric: name of the metric.

    Returns:
        rows with "config", "test", "iteration", "cpu_seconds", "seconds" (means over the seeds), the spread of
        "metric", and that of the "gain" over the baseline at the same iteration and seed.
    """
    baseline = next(iter(runs.values()))
    rows = []
    for config, seeds in runs.items():
        tests = dict.fromkeys(name for points in seeds.values() for x in points.values() for name in x.metrics)
        iterations = sorted({iteration for points in seeds.values() for iteration in points})
        for test in tests:
            for iteration in iterations:
                found = {
                    seed: points[iteration]
                    for seed, points in seeds.items()
                    if iteration in points and test in points[iteration].metrics
                }
                if not found:  # a test that was added later
                    continue
                pairs = [
                    point.metrics[test][metric] - baseline[seed][iteration].metrics[PLAIN][metric]
                    for seed, point in found.items()
                    if iteration in baseline.get(seed, {})
                ]
                rows.append(
                    {
                        "config": config,
                        "test": test,
                        "iteration": iteration,
                        "cpu_seconds": float(np.mean([point.cpu_seconds for point in found.values()])),
                        "seconds": float(np.mean([point.seconds for point in found.values()])),
                        "metric": spread([point.metrics[test][metric] for point in found.values()]),
                        "gain": spread(pairs) if pairs else None,
                    }
                )
    return rows


def check_metric(points: dict[int, Point], metric: str) -> None:
    """
    Raises:
        ConfigError: an evaluation of a run does not have the metric.
    """
    for point in points.values():
        for test, metrics in point.metrics.items():
            if metric not in metrics:
                known = ", ".join(sorted(metrics))
                raise ConfigError(f"--metric {metric}: the evaluation {test!r} has {known}. Give one; no run is lost.")


def table(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """The rows of :func:`summarize` as text."""

    def shown(values: dict[str, float] | None, key: str) -> str:
        if values is None:
            return ""
        return f"{values['mean']:.1f}" + (f" ± {values[key]:.1f}" if values["count"] > 1 else "")

    cells = [
        [
            row["config"],
            row["test"],
            row["iteration"],
            f"{row['cpu_seconds']:.0f}",
            row["metric"]["count"],
            shown(row["metric"], "deviation"),
            shown(row["gain"], "error"),
        ]
        for row in rows
    ]
    headers = ["config", "test", "iterations", "CPU seconds", "seeds", f"{metric} ± deviation", "gain ± standard error"]
    return tabulate(cells, headers, disable_numparse=True)


def draw(rows: Sequence[dict[str, Any]], metric: str, path: str) -> None:
    """The metric by iteration and by CPU seconds, with its deviation over the seeds."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True), ("iteration", "cpu_seconds"), ("iterations", "CPU s")
    ):
        for series in dict.fromkeys((row["config"], row["test"]) for row in rows):
            own = [row for row in rows if (row["config"], row["test"]) == series]
            xs = [row[key] for row in own]
            means, deviations = (np.array([row["metric"][name] for row in own]) for name in ("mean", "deviation"))
            name = series[0] if series[1] == PLAIN else f"{series[0]}, {series[1]}"
            (line,) = axes.plot(xs, means, marker="o", markersize=3, label=name)
            low, high = means - np.nan_to_num(deviations), means + np.nan_to_num(deviations)
            axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.15)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(metric)
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def as_plain(runs: dict[str, dict[int, dict[int, Point]]]) -> list[dict[str, Any]]:
    """The runs as lists and dicts."""
    return [
        {"config": config, "seed": seed, "points": [point._asdict() for point in points.values()]}
        for config, seeds in runs.items()
        for seed, points in seeds.items()
    ]


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write a JSON file in one piece."""
    write_atomically(path, lambda f: json.dump(content, f, indent=1), mode="w")


def _named(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    return name, value


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs", nargs="+", type=_named, required=True, metavar="NAME=FILE", help="config files; the baseline first"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="seeds of the runs")
    parser.add_argument(
        "--test",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY VALUE"),
        help="another evaluation of every model, under these options",
    )
    parser.add_argument("--metric", help="metric to compare; default: that of the best checkpoint, such as segm/AP")
    parser.add_argument("--most-hours", type=float, default=2.0, help="limit for the training time of one run")
    parser.add_argument("--output", default="output/comparison", metavar="DIR", help="folder of the runs and results")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs of all runs, last")
    return parser


def main(args: argparse.Namespace) -> None:
    configs = dict(args.configs)
    if len(configs) < len(args.configs):
        raise ConfigError("--configs: two of them have the same name. Give each its own.")
    tests = {name: opts for name, *opts in args.test}
    for name, opts in tests.items():
        for key in opts[::2]:
            if not key.startswith(TEST_KEYS):
                raise ConfigError(f"--test {name}: {key} is none of {', '.join(TEST_KEYS)}; make it one of --configs.")
    runs: dict[str, dict[int, dict[int, Point]]] = {name: {} for name in configs}
    metric = args.metric or best_metric(load_config(next(iter(configs.values())), args.opts))
    for seed in args.seeds:
        for name, config in configs.items():
            folder = os.path.join(args.output, f"{name}_seed{seed}")
            train(config, seed, folder, tests, args.most_hours, args.opts)
            runs[name][seed] = read_points(folder)
            check_metric(runs[name][seed], metric)
            rows = summarize(runs, metric)
            content = {"configs": configs, "tests": tests, "opts": args.opts, "metric": metric, "summary": rows}
            write_json(os.path.join(args.output, "comparison.json"), {**content, "runs": as_plain(runs)})
            draw(rows, metric, os.path.join(args.output, "comparison.png"))
            print(table(rows, metric))
