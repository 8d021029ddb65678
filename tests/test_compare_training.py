"""The program that compares training runs: its figures, and two tiny configs from the first step to the picture."""

import json
import math

import pytest
from program_helpers import shapes, write_config  # noqa: F401

from knet_d2.errors import ConfigError, KNetError
from knet_d2.programs import compare_training
from knet_d2.programs.compare_training import PLAIN, Point, read_points, spread, summarize, table


def point(iteration, seconds, **metrics):
    return Point(iteration, seconds, 2 * seconds, {test: {"segm/AP": value} for test, value in metrics.items()})


def test_gains_are_of_pairs_with_the_same_seed_and_iteration():
    baseline = {0: {10: point(10, 5.0, plain=20.0)}, 1: {10: point(10, 7.0, plain=30.0)}}
    other = {
        0: {10: point(10, 6.0, plain=24.0, nms=25.0), 20: point(20, 12.0, plain=40.0, nms=44.0)},
        1: {10: point(10, 8.0, plain=36.0, nms=38.0)},
        2: {10: point(10, 10.0, plain=90.0, nms=90.0)},
    }
    rows = {(x["config"], x["test"], x["iteration"]): x for x in summarize({"a": baseline, "b": other}, "segm/AP")}
    assert set(rows) == {("a", PLAIN, 10), *(("b", test, i) for test in (PLAIN, "nms") for i in (10, 20))}
    row = rows["b", PLAIN, 10]
    assert row["metric"]["mean"] == 50 and row["metric"]["count"] == 3
    assert row["cpu_seconds"] == 8 and row["seconds"] == 16
    assert row["gain"] == {"mean": 5.0, "deviation": pytest.approx(math.sqrt(2)), "error": pytest.approx(1), "count": 2}
    assert rows["b", "nms", 10]["gain"]["mean"] == 6.5
    assert rows["b", "nms", 20]["gain"] is None and rows["b", "nms", 20]["metric"]["mean"] == 44
    assert "5.0 ± 1.0" in table(list(rows.values()), "segm/AP")


def test_spread_of_one_value_is_unknown():
    assert spread([3.0])["mean"] == 3 and math.isnan(spread([3.0])["error"])


def test_runs_are_trained_compared_and_continued(tmp_path, shapes, capsys):  # noqa: F811
    (tmp_path / "more").mkdir()
    files = [write_config(folder, shapes, "instance") for folder in (tmp_path, tmp_path / "more")]
    with open(files[1], "a") as f:
        f.write("\n")
    output = tmp_path / "runs"
    arguments = ["--configs", f"plain={files[0]}", f"again={files[1]}", "--output", str(output), "--seeds", "3"]
    arguments += ["--test", "one", "TEST.DETECTIONS_PER_IMAGE", "1"]
    opts = ["--opts", "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "1"]
    parser = compare_training.get_parser()
    with pytest.raises(KNetError, match="--most-hours = 0: the run is at iteration 0"):
        compare_training.main(parser.parse_args([*arguments, "--most-hours", "0", *opts]))
    compare_training.main(parser.parse_args([*arguments, *opts]))
    printed = capsys.readouterr().out
    points = [read_points(str(output / f"{name}_seed3")) for name in ("plain", "again")]
    for run in points:
        assert list(run) == [1, 2, 3]
        assert 0 < run[1].cpu_seconds < run[2].cpu_seconds < run[3].cpu_seconds
        assert set(run[3].metrics) == {PLAIN, "one"}
    assert points[0][3].metrics == points[1][3].metrics  # the same config and seed
    content = json.loads((output / "comparison.json").read_text())
    assert content["metric"] == "segm/AP" and len(content["summary"]) == 12 and len(content["runs"]) == 2
    assert "CPU seconds" in printed and (output / "comparison.png").stat().st_size > 10_000
    files = {path: path.read_bytes() for path in output.rglob(compare_training.RECORDS)}
    compare_training.main(parser.parse_args([*arguments, *opts]))
    assert {path: path.read_bytes() for path in files} == files  # only read
    # Another test of the finished runs is evaluated; other options are another run
    more = [*arguments, "--test", "two", "TEST.DETECTIONS_PER_IMAGE", "2"]
    compare_training.main(parser.parse_args([*more, *opts]))
    for name, run in zip(("plain", "again"), points):
        last = read_points(str(output / f"{name}_seed3"))[3]
        assert {**last.metrics, "two": {}} == {**run[3].metrics, "two": {}} and last.metrics["two"].keys() == {
            *last.metrics["one"]
        }
        assert last.cpu_seconds == run[3].cpu_seconds
    other_test = [*arguments[:-1], "3"]
    for changed in ([*more, *opts, "SOLVER.BASE_LR", "0.5"], [*more, *opts[:1], "SOLVER.MAX_ITER", "2", *opts[3:]]):
        with pytest.raises(ConfigError, match="plain_seed3 has a run with other options .*Give another --output"):
            compare_training.main(parser.parse_args(changed))
    with pytest.raises(ConfigError, match="plain_seed3 has a run with other options .--test one"):
        compare_training.main(parser.parse_args([*other_test, *opts]))
    with pytest.raises(ConfigError, match="--metric segm/APX: the evaluation 'plain' has .*segm/AP, .*no run is lost"):
        compare_training.main(parser.parse_args([*more, "--metric", "segm/APX", *opts]))


def test_bad_command_lines(tmp_path, shapes, capsys):  # noqa: F811
    config = write_config(tmp_path, shapes, "instance")
    parser = compare_training.get_parser()
    with pytest.raises(ConfigError, match="--configs: two of them have the same name"):
        compare_training.main(parser.parse_args(["--configs", f"a={config}", f"a={config}"]))
    trained = ["--test", "a", "MODEL.KNET.NUM_KERNELS", "4"]
    with pytest.raises(ConfigError, match=r"--test a: MODEL\.KNET\.NUM_KERNELS is none of .*one of --configs"):
        compare_training.main(parser.parse_args(["--configs", f"a={config}", *trained]))
    with pytest.raises(SystemExit):
        parser.parse_args(["--configs", config])
    assert "write NAME=VALUE" in capsys.readouterr().err
