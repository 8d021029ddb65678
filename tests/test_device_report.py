"""The device report: its smallest size on the CPU, wrong references, steps that fail or take too long, the page."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

# Of Detectron2's main branch it needs pkg_resources, which setuptools has no more
pytest.importorskip("detectron2.model_zoo", exc_type=ModuleNotFoundError)

from checks.references import device as recordings
from checks.references.cases import COMMITTED
from knet_d2.programs import device_report
from knet_d2.programs.device_report import equality, page, profile, program
from knet_d2.programs.device_report.plan import Step
from knet_d2.programs.device_report.program import Part

ROOT = Path(__file__).resolve().parent.parent


def report(folder, *words, **options):
    """Run the program on the CPU; returns its exit code, the JSON and the page."""
    argv = ["--device", "cpu", "--size", "tiny", "--minutes", "30", "--output", str(folder), *words]
    code = device_report.main(device_report.get_parser().parse_args(argv), **options)
    return code, json.loads((folder / "device_report.json").read_text()), (folder / "device_report.md").read_text()


def test_smallest_report(tmp_path):
    code, found, text = report(tmp_path, recordings=recordings.steps)
    parts = found["parts"]
    assert [failure["traceback"] for part in parts.values() for failure in part["failures"]] == []
    assert code == 0 and all(part["not_run"] == [] for part in parts.values())

    equalities = {(row["check"], row["type"]): row for row in parts["equality"]["rows"]}
    assert all(row["passed"] for row in equalities.values())
    for dtype in ("float32", "float64"):
        assert {("deformable convolution", dtype), ("instance: matches", dtype)} < set(equalities)
    assert "8 compared, 0 out of tolerance" in equalities["ref_pan_r50_c", "float32"]["detail"]
    assert equalities["panoptic: losses", "float32"]["difference"] > 0  # against float64
    assert ("semantic: torch.export", "float32") in equalities

    runs = {row["run"]: row for row in parts["training"]["rows"]}
    tasks = ("panoptic", "instance", "semantic")
    assert set(runs) == {f"{task}, {x}" for task in tasks for x in ("fp32", "bf16", "fp16")} | {
        "panoptic, fp32, resumed"
    }
    assert runs["panoptic, fp32, resumed"]["note"].endswith("by 0.0e+00")
    assert runs["panoptic, fp32, resumed"]["value"] == runs["panoptic, fp32"]["value"]
    assert runs["panoptic, bf16"]["loss"] == pytest.approx(runs["panoptic, fp32"]["loss"], rel=0.1)
    assert "needs a CUDA GPU" in runs["semantic, fp16"]["note"]

    for row in parts["speed"]["rows"]:
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"]) and row["batch"] in (1, 2)
        assert 0 < row["share_of_matrix_rate"] < 2
    training, inference = (row for row in parts["profile"]["rows"] if "operators" in row)
    assert training["operators"] > 2 * inference["operators"] > 1000
    for row in (row for row in parts["profile"]["rows"] if "line" in row):
        name, _, number = row["line"].partition(":")
        assert 0 < int(number) <= len((ROOT / name).read_text().splitlines())
    assert "No step failed." in text and all(f"## {name.capitalize()}" in text for name in parts)


def test_a_wrong_reference_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "references"
    folder.mkdir()
    shutil.copy(COMMITTED / "manifests.json.gz", folder)
    with np.load(COMMITTED / "ref_pan_r50_c.npz") as file:
        arrays = dict(file)
    arrays["total_scores"] = arrays["total_scores"] * 1.001
    np.savez(folder / "ref_pan_r50_c.npz", **arrays)
    monkeypatch.setitem(program.PARTS, "equality", Part(1, lambda setup: ()))
    wrong = lambda setup: recordings.steps(setup, folder)  # noqa: E731
    code, found, text = report(tmp_path, "--parts", "equality", recordings=wrong)
    (row,) = found["parts"]["equality"]["rows"]
    assert code == 1 and not row["passed"] and row["difference"] == pytest.approx(1e-3, rel=0.1)
    assert "1 out of tolerance, nearest to it: total_scores" in row["detail"]
    assert "0 of 1 equalities are within their tolerance." in text and "**out of tolerance**" in text


def test_differences_of_tensors():
    expected = torch.tensor([1.0, -4.0])
    assert equality.relative_difference(torch.tensor([1.0, -4.1]), expected) == pytest.approx(0.025)
    assert equality.relative_difference(torch.tensor([1.0, float("nan")]), expected) == float("inf")
    assert equality.relative_difference(expected[:1], expected) == float("inf")
    assert equality.share_of_different(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert not equality.row("a", "float32", float("nan"), 1.0)["passed"]


def fail():
    raise RuntimeError("this step is broken")


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    def written():
        """The step before this one is in the file already."""
        assert json.loads((tmp_path / "device_report.json").read_text())["parts"]["training"]["rows"]
        return []

    def no_steps(setup):
        raise RuntimeError("no list of steps")

    rows = [{"run": "a", "note": "done"}]
    steps = [Step("broken", fail), Step("whole", lambda: rows), Step("reader", written)]
    monkeypatch.setitem(program.PARTS, "profile", Part(1, no_steps))
    monkeypatch.setitem(program.PARTS, "training", Part(1, lambda setup: steps))
    code, found, text = report(tmp_path, "--parts", "profile", "training")
    assert code == 1 and found["parts"]["training"]["rows"] == rows
    assert [x["step"] for x in found["parts"]["training"]["failures"]] == ["broken"]
    assert [x["step"] for x in found["parts"]["profile"]["failures"]] == ["list of steps"]
    assert "RuntimeError: this step is broken" in text and "RuntimeError: no list of steps" in text
    assert "2 steps failed." in text


def test_the_time_limit_ends_a_step_and_leaves_the_rest_of_its_time_to_later_parts(tmp_path, monkeypatch):
    def wait():
        time.sleep(60)

    rows = [{"run": "a", "note": "done"}]
    steps = [Step("quick", lambda: rows), Step("slow", wait), Step("next", fail)]
    monkeypatch.setitem(program.PARTS, "training", Part(1, lambda setup: steps))
    monkeypatch.setitem(program.PARTS, "profile", Part(3, lambda setup: []))
    code, found, text = report(tmp_path, "--minutes", "0.02", "--parts", "training", "profile")
    part = found["parts"]["training"]
    assert code == 0 and part["rows"] == rows and part["not_run"] == ["slow", "next"] and part["failures"] == []
    assert part["limit"] == pytest.approx(1.2 / 4, rel=0.1)
    assert found["parts"]["profile"]["limit"] < 1.2 - part["limit"] + 0.01
    assert "The time limit of this part ended before: slow, next." in text


def test_parts_of_an_earlier_run_of_the_same_size_stay(tmp_path, monkeypatch):
    for name in ("training", "profile"):
        monkeypatch.setitem(program.PARTS, name, Part(1, lambda setup: [Step("a", lambda: [{"run": "a"}])]))
        _, found, text = report(tmp_path, "--parts", name)
    assert [part["rows"] for part in found["parts"].values()] == [[{"run": "a"}], [{"run": "a"}]]
    assert "## Training" in text and "## Profile" in text
    _, found, _ = report(tmp_path, "--parts", "profile", "--size", "full")
    assert list(found["parts"]) == ["profile"]


def test_counts_of_what_a_profiler_sees():
    on_device = ["gemm", "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pageable)", "Memset (Device)", "add"]
    on_cpu = ["aten::mm", "cudaLaunchKernel", "cudaStreamSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize"]
    counts = profile.device_counts(on_device, on_cpu)
    assert counts == {"kernels": 2, "copies to device": 1, "copies to host": 1, "synchronisations": 3}


def test_longest_waits_are_sums_by_line_and_operator():
    waits = [profile.Wait("item", seconds, line) for seconds, line in ((0.1, "a"), (0.2, "a"), (0.25, "b"))]
    waits += [profile.Wait("nonzero", 0.001 * i, f"c{i}") for i in range(9)]
    first, second, *rest = profile.longest(waits)
    assert first == {"line": "a", "operator": "item", "times": 2, "milliseconds": pytest.approx(300)}
    assert second["line"] == "b" and [row["line"] for row in rest] == ["c8", "c7", "c6"]


def test_page_shows_another_report_beside_equal_runs_only():
    def training_row(value, iterations=10):
        row = {"run": "panoptic, fp32", "iterations": iterations, "batch": 8, "images": 20, "loss": 1.5}
        return {**row, "metric": "PQ", "value": value, "seconds": 3.0}

    def content(name, *rows):
        part = {"command": "python", "limit": 1.0, "seconds": 1.0, "rows": list(rows), "failures": [], "not_run": []}
        return {"device_name": name, "environment": {}, "parts": {"training": part}}

    this = content("GPU", training_row(40.0), training_row(50.0, iterations=20))
    text = page.markdown(this, content("CPU", training_row(41.25)))
    lines = [line for line in text.splitlines() if line.startswith("| panoptic")]
    assert "PQ 40.00" in lines[0] and "PQ 41.25" in lines[0]
    assert "PQ 50.00" in lines[1] and "41.25" not in lines[1]
    assert "CPU" not in page.markdown(this)
