"""Prediction in shards: rows, errors, shares of processes, and jobs that are killed at any moment."""

import functools
import hashlib
import json
import os
import random
import signal
import sys
import time

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import CfgNode
from PIL import Image
from program_helpers import ROOT

from knet_d2.data.classes import ClassTable
from knet_d2.data.pixels import PixelFormat
from knet_d2.errors import ConfigError, DataError
from knet_d2.inference import bulk, ray_bulk
from knet_d2.inference.batches import batched
from knet_d2.inference.bulk import BulkJob, Progress, Share, read_list, share_of
from knet_d2.inference.ray_bulk import run_on_ray
from knet_d2.inference.shard_files import FORMATS
from knet_d2.programs import predict_bulk, run
from knet_d2.programs.predict_bulk import choose_share, find_inputs
from knet_d2.results.prediction import Prediction
from knet_d2.results.segment import Segment

CLASSES = ClassTable(["dark", "bright"], [0, 1], [(1, 2, 3), (4, 5, 6)], 1, dataset_ids=[10, 20])


class Brightness:
    """Stands for a predictor: dark pixels are a thing, bright ones stuff."""

    classes, pixel_format = CLASSES, PixelFormat("RGB")

    def __init__(self, poison=-1, seconds=0.0, **options):
        self.cfg = CfgNode({"MODEL": {"WEIGHTS": __file__, "DEVICE": "cpu", **options}})
        self.poison, self.seconds, self.batches = poison, seconds, []

    def predict_frames(self, frames, batch_size, workers):
        for batch in batched((frame for frame in frames if frame.image is not None), batch_size):
            self.batches.append(len(batch))
            time.sleep(self.seconds)
            if any(frame.image[0, 0, 0] == self.poison for frame in batch):
                raise RuntimeError("not enough memory")
            for frame in batch:
                dark = frame.image[..., 0] < 128
                segments = [Segment.from_mask(dark, 0, 0.5), Segment.from_mask(~dark, 1, None)]
                prediction = Prediction(dark.shape, [x for x in segments if x is not None], CLASSES)
                yield frame, {"panoptic_seg": prediction, "instances": prediction._replace(segments=segments[:1])}


@pytest.fixture
def photos(tmp_path):
    """Paths of 11 images; the first pixel of each is its number, and the one with number 4 can't be read."""
    paths = []
    for i in range(11):
        pixels = np.random.RandomState(i).randint(0, 256, (6, 8, 3), np.uint8)
        pixels[0, 0] = i
        paths.append(str(tmp_path / f"{i:02d}.png"))
        Image.fromarray(pixels).save(paths[-1])
    (tmp_path / "04.png").write_bytes(b"cut off")
    return paths


def job_of(folder, paths, predictor=None, **options):
    options = {"shard_size": 3, "batch_size": 2, **options}
    return BulkJob(str(folder), predictor or Brightness(), paths, **options)


def finish(job, share=None):
    return list(job.run(share or Share(0, 1)))[-1]


def rows_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def contents(folder):
    """Hash of each file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_row_for_every_image(photos, tmp_path):
    out = tmp_path / "out"
    assert finish(job_of(out, photos)) == Progress(predicted=11, found=0, broken=1)
    rows = rows_of(out)
    assert [(row["id"], row["file_name"]) for row in rows] == list(enumerate(photos))
    assert sorted(x.name for x in out.glob("*.jsonl")) == [f"{i:06d}.jsonl" for i in range(4)]
    assert "can't be read" in rows[4]["error"] and set(rows[4]) == {"id", "file_name", "error"}
    assert [x["id"] for x in json.loads((out / "job.json").read_text())["categories"]] == [10, 20]
    for row in rows[:4] + rows[5:]:
        dark = np.asarray(Image.open(row["file_name"]))[..., 0] < 128
        (instance,) = row["instances"]
        assert instance["category_id"] == 10 and (mask_util.decode(instance["segmentation"]) == dark).all()
        segments = {x["id"]: x for x in row["panoptic"]["segments_info"]}
        ids = np.asarray(Image.open(out / row["panoptic"]["file_name"])).astype(int) @ [1, 256, 65536]
        assert {i: x["category_id"] for i, x in segments.items()} == {1: 10, 2: 20}
        assert ((ids == 1) == dark).all() and segments[1]["area"] == dark.sum()


def test_a_line_is_one_row_whatever_it_names(photos, tmp_path):
    """A folder or a pattern would give several frames, and each row the prediction of another image."""
    paths = [photos[0], str(tmp_path / "0[1-3].png"), str(tmp_path), str(tmp_path / "absent.png"), photos[3]]
    predictor = Brightness()
    assert finish(job_of(tmp_path / "out", paths, predictor, shard_size=5)) == Progress(predicted=5, found=0, broken=3)
    assert predictor.batches == [2]  # not one by one
    rows = rows_of(tmp_path / "out")
    assert all("does not exist" in row["error"] for row in rows[1:4])
    for row, path in ((rows[0], photos[0]), (rows[4], photos[3])):
        dark = np.asarray(Image.open(path))[..., 0] < 128
        assert (mask_util.decode(row["instances"][0]["segmentation"]) == dark).all()


def test_a_job_without_a_single_prediction_fails(photos, tmp_path, monkeypatch, capsys):
    for paths, code in (([photos[0], "absent.png"], 0), (["absent.png", "absent_2.png"], 1)):
        monkeypatch.setattr(
            predict_bulk, "open_job", lambda _, paths=paths: job_of(tmp_path / str(len(paths[0])), paths)
        )
        arguments = ["m.pth", "--input", "list.txt", "--output", "out"]
        assert run(predict_bulk.main, predict_bulk.get_parser(), arguments) == code
        assert ("--input list.txt: no image could be predicted" in capsys.readouterr().err) == code


def test_results_are_no_inputs(photos, tmp_path):
    (tmp_path / "out" / "panoptic").mkdir(parents=True)
    Image.open(photos[0]).save(tmp_path / "out" / "panoptic" / "0.png")
    assert find_inputs(str(tmp_path), str(tmp_path / "out")) == photos


def test_what_is_there_is_not_predicted_again(photos, tmp_path):
    out = tmp_path / "out"
    finish(job_of(out, photos))
    before = contents(out)
    (out / "000002.jsonl").unlink()
    predictor = Brightness()
    assert finish(job_of(out, photos, predictor)) == Progress(predicted=3, found=8, broken=0)
    assert predictor.batches == [2, 1] and contents(out) == before


def test_an_image_that_stops_the_network_is_one_row(photos, tmp_path, caplog):
    predictor = Brightness(poison=7)
    assert finish(job_of(tmp_path / "out", photos, predictor)) == Progress(predicted=11, found=0, broken=2)
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows if "error" in row] == [4, 7]
    assert rows[7]["error"] == "RuntimeError: not enough memory" and "one by one" in caplog.text
    finish(job_of(tmp_path / "other", photos))
    others = rows_of(tmp_path / "other")
    assert [row for row in rows if row["id"] != 7] == [row for row in others if row["id"] != 7]


def test_a_machine_that_predicts_nothing_writes_no_errors(photos, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no GPU")

    monkeypatch.setattr(Brightness, "predict_frames", fail)
    with pytest.raises(RuntimeError, match="no GPU"):
        finish(job_of(tmp_path / "out", photos))
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_shares_are_all_shards_once(photos, tmp_path):
    shares = [finish(job_of(tmp_path / "shared", photos), Share(i, 3)) for i in range(3)]
    assert [x.predicted for x in shares] == [5, 3, 3] and all(x.found == 0 for x in shares)
    finish(job_of(tmp_path / "alone", photos))
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    with pytest.raises(ConfigError, match="--share 3/3"):
        finish(job_of(tmp_path / "shared", photos), Share(3, 3))


def test_another_job_in_the_folder(photos, tmp_path):
    out = tmp_path / "out"
    finish(job_of(out, photos))
    for paths, options, name in (
        (photos[:-1], {}, "images and list"),
        (photos[::-1], {}, "list"),
        (photos, {"shard_size": 5}, "shard_size"),
    ):
        with pytest.raises(ConfigError, match=f"holds another job, with other {name}. Use"):
            job_of(out, paths, **options)
    (tmp_path / "weights.pth").write_bytes(b"other")
    for changed, name in (
        ({"SCORE": 0.9}, "options"),
        ({"WEIGHTS": str(tmp_path / "weights.pth")}, "model and weights"),
    ):
        with pytest.raises(ConfigError, match=f"holds another job, with other {name}. Use"):
            job_of(out, photos, Brightness(**changed))
    job_of(out, photos, Brightness(DEVICE="cuda:1"))
    for name in ("shard_size", "batch_size", "workers"):
        with pytest.raises(ConfigError, match=f"{name} = 0: use at least 1"):
            job_of(out, photos, **{name: 0})
    (out / "job.json").write_text("[")
    with pytest.raises(ConfigError, match="job.json: is damaged"):
        job_of(out, photos)


@pytest.mark.parametrize("moment", ["png", "rows", "renamed"])
def test_an_end_at_each_step_of_a_write(moment, photos, tmp_path, monkeypatch):
    finish(job_of(tmp_path / "whole", photos))
    out, write = tmp_path / "out", bulk.write_atomically

    class Killed(BaseException):
        pass

    def ends(path, function, mode="wb"):
        is_last = path.endswith("000001.jsonl")
        if (moment, True) in (("rows", is_last), ("png", path.endswith("000000005.png"))):
            raise Killed
        write(path, function, mode)
        if moment == "renamed" and is_last:
            raise Killed

    monkeypatch.setattr(bulk, "write_atomically", ends)
    with pytest.raises(Killed):
        finish(job_of(out, photos))
    assert (out / "000001.jsonl").exists() == (moment == "renamed")
    monkeypatch.setattr(bulk, "write_atomically", write)
    finish(job_of(out, photos))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_killed_at_random_moments(photos, tmp_path):
    finish(job_of(tmp_path / "whole", photos))
    out, rng, kills = tmp_path / "out", random.Random(0), 0
    for attempt in range(60):
        child = os.fork()
        if not child:
            try:
                finish(job_of(out, photos, Brightness(seconds=0.003)))
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 0.004 * (attempt + 1)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        rows = rows_of(out)
        assert len({row["id"] for row in rows}) == len(rows)
        if len(rows) == len(photos):
            break
    finish(job_of(out, photos))  # also where the machine was too slow for any of them to end
    assert kills > 0
    for path in out.rglob(".*.tmp"):  # what was being written; no row names it
        path.unlink()
    assert contents(out) == contents(tmp_path / "whole")


def test_parquet_has_the_rows_of_json_lines(photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for file_format in FORMATS:
        finish(job_of(tmp_path / file_format, photos, file_format=file_format))
    tables = [parquet.read_table(path) for path in sorted((tmp_path / "parquet").glob("*.parquet"))]
    assert len(tables) == 4 and all(table.schema == tables[0].schema for table in tables)
    found = [row for table in tables for row in table.to_pylist()]
    for row, expected in zip(found, rows_of(tmp_path / "jsonl"), strict=True):
        assert {name: value for name, value in row.items() if value is not None} == expected
    names = ["panoptic/000001/000000005.png", "panoptic/000003/000000010.png"]
    assert all((tmp_path / file_format / name).exists() for file_format in FORMATS for name in names)
    with pytest.raises(ConfigError, match="other format"):
        job_of(tmp_path / "parquet", photos)


def test_a_name_that_is_not_utf_8(tmp_path, caplog):
    parquet = pytest.importorskip("pyarrow.parquet")
    finish(job_of(tmp_path, [os.fsdecode(b"no utf-8 \xff.png")], file_format="parquet"))
    (row,) = parquet.read_table(tmp_path / "000000.parquet").to_pylist()
    assert row["file_name"] == r"no utf-8 \udcff.png"
    for text in (row["error"], caplog.messages[0]):
        assert r"no utf-8 \udcff.png does not exist" in text


def test_parquet_without_its_package(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="--format parquet: it needs a package; pip install pyarrow"):
        finish(job_of(tmp_path, photos, file_format="parquet"))


# ---- on Ray ------------------------------------------------------------------------------------------------------


def dying_job(folder, paths, deaths):
    """The job in an actor that is killed once before, while or after each of some files is written."""
    write = bulk.write_atomically
    moments = {"000000.jsonl": "before", "000002.jsonl": "while", "000000005.png": "while", "000003.jsonl": "after"}

    def die_once(path, moment):
        mark = os.path.join(deaths, os.path.basename(path))
        if moments.get(os.path.basename(path)) == moment and not os.path.exists(mark):
            open(mark, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_write(path, function, mode="wb"):
        die_once(path, "before")
        write(path, lambda f: (function(f), f.flush(), die_once(path, "while")), mode)
        die_once(path, "after")

    bulk.write_atomically = dying_write
    return job_of(folder, paths)


class Poisoned(Brightness):
    """Ends its process at every image."""

    def predict_frames(self, frames, batch_size, workers):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:  # of the processes that Ray starts
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.path.dirname(__file__)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


def test_actors_of_ray_that_are_killed(ray, photos, tmp_path):
    deaths, out = tmp_path / "deaths", tmp_path / "out"
    deaths.mkdir()
    finish(job_of(tmp_path / "whole", photos))
    open_job = functools.partial(dying_job, str(out), photos, str(deaths))
    *_, last = run_on_ray(open_job, num_shards=4, actors=2)
    assert len(list(deaths.iterdir())) == 4  # processes that were killed
    assert last.predicted + last.found == 11
    for path in out.rglob(".*.tmp"):
        path.unlink()
    assert contents(out) == contents(tmp_path / "whole")


def test_what_ray_refuses(ray, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_bulk, "MOST_TRIES", 1)
    poisoned = functools.partial(job_of, str(tmp_path), photos, Poisoned())
    with pytest.raises(ConfigError, match="--ray 2: the processes that predict die again and again"):
        list(run_on_ray(poisoned, 4, actors=2))
    with pytest.raises(ConfigError, match="--ray 3: this cluster has 2 cores"):
        list(run_on_ray(functools.partial(job_of, str(tmp_path), photos), 4, actors=3))
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="--ray 2: it is missing"):
        list(run_on_ray(functools.partial(job_of, str(tmp_path), photos), 4, actors=2))


def test_lists_of_images(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\n\n/b/c.png\r\n")
    assert read_list(str(tmp_path / "list.txt")) == [str(tmp_path / "a.png"), "/b/c.png"]
    (tmp_path / "marked.txt").write_text("\ufeffa.png\n")  # as some editors write it
    assert read_list(str(tmp_path / "marked.txt")) == [str(tmp_path / "a.png")]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="this list is empty"):
        read_list(str(tmp_path / "empty.txt"))
    with pytest.raises(DataError, match="no such list"):
        read_list(str(tmp_path / "absent.txt"))


def test_shares_of_processes():
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "WORLD_SIZE": "8"}
    assert share_of({}) == Share(0, 1) == share_of({"SLURM_PROCID": "1"})
    assert share_of(torchrun) == Share(2, 8) and share_of(step) == Share(1, 3)
    assert share_of(array) == Share(2, 4) and share_of(array | step) == Share(7, 12)
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID = 9: number the tasks"):
        share_of(array | {"SLURM_ARRAY_TASK_ID": "9"})
    with pytest.raises(ConfigError, match="RANK = 'two'"):
        share_of(torchrun | {"RANK": "two"})
    assert choose_share("3/4") == Share(3, 4)
    for text in ("0/0", "4/4", "1", "-1/4"):
        with pytest.raises(ConfigError, match=f"--share {text}: write it as 0/4"):
            choose_share(text)
