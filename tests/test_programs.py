"""train_net.py and the demo programs end to end, with tiny models on a few generated images."""

import json
import os
import re
import time
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import yaml
from detectron2.engine import default_argument_parser
from helpers import spread_scores
from PIL import Image
from program_helpers import NUM_IMAGES, ROOT, SIZE, Program, shapes, write_config  # noqa: F401

from knet_d2.data.classes import class_table
from knet_d2.engine import Predictor, Trainer, load_config, replay
from knet_d2.errors import CheckpointError, ConfigError, DataError, KNetError, NonFiniteError
from knet_d2.inference import ImagePredictor
from knet_d2.inference.sources import Video
from knet_d2.programs import compare, demo, train
from knet_d2.results import Segment
from knet_d2.results.comparison import ground_truth
from knet_d2.results.pictures import draw_segments, picture_sheet


@pytest.fixture(scope="module")
def models(tmp_path_factory, shapes):
    """Config file and weights by task; the models aren't trained, but their scores differ."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for task in ("instance", "panoptic", "semantic"):
        config = write_config(folder, shapes, task)
        torch.manual_seed(0)
        model = Trainer.build_model(load_config(config))
        if task != "semantic":
            spread_scores(model)
        torch.save({"model": model.state_dict()}, folder / f"{task}.pth")
        found[task] = (config, str(folder / f"{task}.pth"))
    return found


def run_demo(models, task, *arguments, opts=()):
    config, weights = models[task]
    opts = ["--opts", "MODEL.WEIGHTS", weights, *opts]
    return demo.main(demo.get_parser().parse_args(["--config-file", config, *map(str, arguments), *opts]))


# ---- train_net.py ----------------------------------------------------------------------------------------------


def test_killed_training_resumes_exactly(tmp_path, shapes):
    """SIGKILL after the first checkpoint, with loader workers: same weights, optimiser state, metrics file."""
    config = write_config(tmp_path, shapes, "panoptic", MAX_ITER=8, CHECKPOINT_PERIOD=2, LOG_PERIOD=3)
    arguments = ["train_net.py", "--config-file", config, "DATALOADER.NUM_WORKERS", "2", "TEST.EVAL_PERIOD", "4"]
    last = tmp_path / "killed" / "last_checkpoint"
    with Program(tmp_path, *arguments, "OUTPUT_DIR", tmp_path / "killed") as program:
        while not last.exists() and program.process.poll() is None:
            time.sleep(0.002)
        program.kill()
    killed_at = last.read_text()
    with (
        Program(tmp_path, *arguments, "OUTPUT_DIR", tmp_path / "whole") as whole,
        Program(tmp_path, arguments[0], "--resume", *arguments[1:], "OUTPUT_DIR", tmp_path / "killed") as resumed,
    ):
        for program in (whole, resumed):
            code, output = program.finish()
            assert code == 0, output[-3000:]
    assert f"Loading trainer from {tmp_path / 'killed' / killed_at}" in output

    whole, killed = (torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(value, killed["model"][name]) for name, value in whole["model"].items())
    assert whole["iteration"] == killed["iteration"] == 7
    assert whole["trainer"]["hooks"] == killed["trainer"]["hooks"]
    first, second = (x["trainer"]["_trainer"]["optimizer"] for x in (whole, killed))
    assert first["param_groups"] == second["param_groups"]
    for key, state in first["state"].items():
        assert all(torch.equal(value, second["state"][key][name]) for name, value in state.items())
    lines = (tmp_path / "whole" / "metrics.json").read_text()
    assert lines == (tmp_path / "killed" / "metrics.json").read_text()
    assert [json.loads(line)["iteration"] for line in lines.splitlines()] == [2, 3, 5, 7]
    check_evaluation_only(tmp_path, config, json.loads(lines.splitlines()[-1]))


def check_evaluation_only(folder, config, last_record):
    """--eval-only on the final weights gives the numbers that the end of the training gave."""
    weights = str(folder / "whole" / "model_final.pth")
    arguments = ["--eval-only", "--config-file", config, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(folder / "eval")]
    results = train.train(default_argument_parser().parse_args(arguments))
    assert "panoptic_seg/PQ" in last_record
    for name, value in results["panoptic_seg"].items():
        assert value == pytest.approx(last_record[f"panoptic_seg/{name}"], nan_ok=True)


@pytest.mark.parametrize("task, metric", [("instance", "segm/AP"), ("semantic", "sem_seg/mIoU")])
def test_training_of_the_other_tasks(tmp_path, shapes, task, metric):
    config = write_config(tmp_path, shapes, task, MAX_ITER=2)
    arguments = ["--config-file", config, "OUTPUT_DIR", str(tmp_path), "TEST.NUM_PICTURES", "1", "SEED", "-1"]
    results = train.train(default_argument_parser().parse_args(arguments))
    group, name = metric.split("/")
    assert np.isfinite(results[group][name]) or task == "instance"
    record = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert record["iteration"] == 1 and metric in record and record["total_loss"] > 0
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["SEED"] >= 0
    # what was resolved from the data is what is saved
    knet = saved["MODEL"]["KNET"]
    assert (knet["NUM_THING_CLASSES"], knet["NUM_STUFF_CLASSES"]) == ((4, 0) if task == "instance" else (0, 7))


def test_step_that_is_not_finite_can_be_repeated(tmp_path, shapes, capsys):
    config = write_config(tmp_path, shapes, "panoptic", MAX_ITER=20, BASE_LR=1e6, WARMUP_ITERS=0, NON_FINITE_STEPS=2)
    arguments = ["--config-file", config, "OUTPUT_DIR", str(tmp_path / "run")]
    with pytest.raises(NonFiniteError) as error:
        train.train(default_argument_parser().parse_args(arguments))
    what, command = str(error.value).split("To repeat it: python -m knet_d2.engine.replay ")
    assert re.search(r"not finite.*Iteration \d+, learning rate .*, images: .*\.jpg", what, re.IGNORECASE)

    replay.main(replay.get_parser().parse_args([command]))
    assert what.strip() in capsys.readouterr().out

    # without what makes it fail, it says so
    path = Path(command) / "model.pth"
    state = torch.load(path, weights_only=True)
    state["model"] = Trainer.build_model(load_config(config)).state_dict()
    torch.save(state, path)
    with pytest.raises(KNetError, match="all losses are finite this time"):
        replay.main(replay.get_parser().parse_args([command, "SEED", "3"]))
    assert "Process 0: finite, total_loss" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="batch_rank0.pth is missing"):
        replay.main(replay.get_parser().parse_args([str(tmp_path)]))


def test_bad_input_is_one_line(tmp_path, shapes):
    config = write_config(tmp_path, shapes, "instance", MAX_ITER=1)
    with Program(tmp_path, "train_net.py", "--config-file", config, "SOLVER.BASE_LRR", "1.0") as program:
        code, output = program.finish()
    assert code == 1 and "Traceback" not in output
    (message,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert "SOLVER.BASE_LRR" in message and "SOLVER.BASE_LR?" in message


# ---- demo.py ---------------------------------------------------------------------------------------------------


def decode(rle):
    return mask_util.decode(rle).astype(bool)


def results_of(path):
    content = json.loads(Path(path).read_text())
    ids = [c["id"] for c in content["categories"]]
    assert len(set(ids)) == len(ids) and all(isinstance(c["name"], str) for c in content["categories"])
    for image in content["images"]:
        assert (image["height"], image["width"]) == (SIZE, SIZE) and os.path.isfile(image["file_name"])
    return content, ids


def test_demo_program(tmp_path, models, shapes):
    """A folder of images through the command line: pictures, JSON and panoptic PNGs; a bar is for terminals."""
    config, weights = models["panoptic"]
    (tmp_path / "in").mkdir()
    for path in sorted((shapes / "images").iterdir()):
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    arguments = ["--config-file", config, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    arguments += ["--json", tmp_path / "results.json", "--confidence-threshold", "0.0"]
    opts = ["--opts", "MODEL.WEIGHTS", weights, "MODEL.KNET.TEST.OVERLAP_THRESHOLD", "0.0"]
    with Program(tmp_path, "demo/demo.py", *arguments, *opts) as program:
        code, output = program.finish()
    assert code == 1, output[-3000:]  # for the broken one; all others are done
    assert "broken.jpg" in output and "Traceback" not in output and "image/s]" not in output
    pictures = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in pictures] == [f"{i:06d}.jpg" for i in range(NUM_IMAGES)]
    assert min(Image.open(pictures[0]).size) >= 320

    content, ids = results_of(tmp_path / "results.json")
    assert content["info"]["task"] == "panoptic" and len(ids) == 7 and len(content["images"]) == NUM_IMAGES
    num_segments = 0
    for image in content["images"]:
        png = np.asarray(Image.open(tmp_path / "results_panoptic" / image["panoptic"]["file_name"])).astype(int)
        segment_ids = png @ [1, 256, 65536]
        segments = image["panoptic"]["segments_info"]
        assert set(np.unique(segment_ids)) - {0} == {s["id"] for s in segments}
        for s in segments:
            assert s["category_id"] in ids and 0 <= s["score"] <= 1
            assert isinstance(s["area"], int) and s["area"] == (segment_ids == s["id"]).sum()
        num_segments += len(segments)
    assert num_segments > 0


def test_demo_of_an_instance_model(tmp_path, models, shapes):
    results = {}
    for threshold in (0.0, 0.6, 1.0):
        path = tmp_path / f"{threshold}.json"
        arguments = ["--input", str(shapes / "images" / "*.jpg"), "--json", path, "--confidence-threshold", threshold]
        assert run_demo(models, "instance", *arguments) == 0
        content, ids = results_of(path)
        results[threshold] = [x for image in content["images"] for x in image["instances"]]
        for x in results[threshold]:
            mask = decode(x["segmentation"])
            assert mask.shape == (SIZE, SIZE) and x["category_id"] in ids and x["score"] >= threshold
            ys, xs = mask.nonzero()
            if len(xs):
                expected = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
                assert x["bbox"] == [float(v) for v in expected]
    assert len(results[0.0]) > len(results[0.6]) > len(results[1.0]) == 0
    assert results[0.6] == [x for x in results[0.0] if x["score"] >= 0.6]


def test_confidence_threshold_of_a_panoptic_model(tmp_path, models, shapes):
    def things(threshold):
        image = next((shapes / "images").iterdir())
        arguments = ["--input", image, "--json", tmp_path / "r.json", "--confidence-threshold", threshold]
        run_demo(models, "panoptic", *arguments, opts=["MODEL.KNET.TEST.OVERLAP_THRESHOLD", "0.0"])
        (record,) = json.loads((tmp_path / "r.json").read_text())["images"]
        return [s["score"] for s in record["panoptic"]["segments_info"] if s["isthing"]]

    everything = things(0.0)
    assert everything and things(1.0) == []
    middle = sorted(everything)[len(everything) // 2]
    assert things(middle) == [s for s in everything if s >= middle]


def test_demo_of_a_semantic_model(tmp_path, models, shapes):
    image = sorted((shapes / "images").iterdir())[0]
    assert (
        run_demo(models, "semantic", "--input", image, "--output", tmp_path / "a.png", "--json", tmp_path / "r.json")
        == 0
    )
    # The PNG has the classes of the JSON
    assert run_demo(models, "semantic", "--input", image, "--masks", tmp_path / "masks") == 0
    (classes,) = (np.asarray(Image.open(path)) for path in (tmp_path / "masks").iterdir())
    areas = np.unique(classes, return_counts=True)
    found = json.loads((tmp_path / "r.json").read_text())["images"][0]["semantic"]
    assert areas[1].tolist() == [x["area"] for x in found] and areas[0].max() < 255 and classes.dtype == np.uint8
    content, ids = results_of(tmp_path / "r.json")
    (record,) = content["images"]
    masks = np.stack([decode(x["segmentation"]) for x in record["semantic"]])
    assert (masks.sum(axis=0) == 1).all()  # every pixel has one class
    assert [x["area"] for x in record["semantic"]] == masks.sum(axis=(1, 2)).tolist()
    assert {x["category_id"] for x in record["semantic"]} <= set(ids)
    plain = np.asarray(Image.open(image).convert("RGB")).repeat(5, 0).repeat(5, 1)
    assert (np.asarray(Image.open(tmp_path / "a.png")) != plain).mean() > 0.5


def test_masks_of_a_video_are_refused(tmp_path, models, shapes):
    write_frames(tmp_path / "v.mp4", shapes, 2)
    with pytest.raises(ConfigError, match="--masks .*is for images"):
        run_demo(models, "instance", "--video-input", tmp_path / "v.mp4", "--masks", tmp_path / "masks")


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path, models, shapes):
    image = sorted((shapes / "images").iterdir())[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / image.name).write_bytes(image.read_bytes())
    run_demo(models, "semantic", "--input", image, tmp_path / "other", "--output", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [image.name, f"{image.stem}_1.jpg"]


def write_frames(path, shapes, count):
    """A video of 10 frames a second from images, one after the other and again; returns its frames, BGR."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10.0, (SIZE, SIZE))
    images = sorted((shapes / "images").iterdir())
    frames = [cv2.imread(str(images[i % len(images)])) for i in range(count)]
    for frame in frames:
        writer.write(frame)
    writer.release()
    return frames


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_demo_on_a_video(tmp_path, models, shapes, task):
    source = str(tmp_path / "in.mp4")
    frames = write_frames(source, shapes, 3)
    (tmp_path / "out").mkdir()
    results = tmp_path / "r.json"
    assert run_demo(models, task, "--video-input", source, "--output", tmp_path / "out", "--json", results) == 0
    names = [image["file_name"] for image in json.loads(results.read_text())["images"]]
    assert names == [f"{source}#{i}" for i in range(3)]
    tracks = json.loads((tmp_path / "r_tracks.json").read_text())
    assert bool(tracks) is (task != "semantic") and all(len(x["segmentations"]) == 3 for x in tracks)
    video = Video(str(tmp_path / "out" / "in_knet.mp4"))
    drawn = [frame.image for frame in video]
    assert len(drawn) == 3 and drawn[0].shape == (SIZE, SIZE, 3) and video.rate == pytest.approx(10)
    if task == "semantic":  # every pixel is painted; few instances of an untrained model may be
        assert np.abs(drawn[0].astype(int) - frames[0][:, :, ::-1]).mean() > 5


def test_interrupted_video_leaves_whole_files(tmp_path, models, shapes, monkeypatch):
    """Ctrl+C at the fourth of 6 frames: video, results and tracks of three frames can be read."""
    write_frames(tmp_path / "in.mp4", shapes, 6)
    follower = ImagePredictor.follower

    def interrupted(self):
        follow, frames = follower(self), iter(range(3))

        def follow_three(image):
            if next(frames, None) is None:
                raise KeyboardInterrupt
            return follow(image)

        return follow_three

    monkeypatch.setattr(ImagePredictor, "follower", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(
            *(models, "panoptic", "--video-input", tmp_path / "in.mp4", "--output", tmp_path / "out.mp4"),
            *("--json", tmp_path / "r.json", "--trail", 5),
        )
    assert len(list(Video(str(tmp_path / "out.mp4")))) == 3
    images = json.loads((tmp_path / "r.json").read_text())["images"]
    assert len(images) == 3 and all("track_id" in x for image in images for x in image["panoptic"]["segments_info"])
    assert {len(x["segmentations"]) for x in json.loads((tmp_path / "r_tracks.json").read_text())} == {3}


def test_bad_input_of_the_demo(tmp_path, models, shapes):
    with pytest.raises(DataError, match="nowhere"):
        run_demo(models, "semantic", "--input", tmp_path / "nowhere*.jpg", "--output", tmp_path)
    with pytest.raises(DataError, match="absent.mp4"):
        run_demo(models, "semantic", "--video-input", tmp_path / "absent.mp4", "--output", tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DataError, match="text.mp4"):
        run_demo(models, "semantic", "--video-input", tmp_path / "text.mp4", "--output", tmp_path)
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS"):
        run_demo(models, "semantic", "--input", shapes / "images", "--output", tmp_path, opts=["MODEL.WEIGHTS", ""])


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_predictor_takes_bgr(models, shapes, image_format):
    """The model gets the same picture for every channel order of its config."""
    config, weights = models["semantic"]
    cfg = load_config(config, ["MODEL.WEIGHTS", weights, "INPUT.FORMAT", image_format])
    predictor = Predictor(cfg)
    seen = []
    predictor.model.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]["image"]))
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[..., 0] = 255  # blue
    predictor(image)
    assert seen[0][:, 0, 0].tolist() == ([0, 0, 255] if image_format == "RGB" else [255, 0, 0])


# ---- pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_comparison_sheet(tmp_path, models, task):
    config, weights = models[task]
    path = tmp_path / "new folder" / "sheet.png"
    arguments = ["--config-file", config, "--number", "3", "--output", str(path), "--opts", "MODEL.WEIGHTS", weights]
    compare.main(compare.get_parser().parse_args(arguments))
    width, height = Image.open(path).size
    assert width > 4 * 320 and height > 2 * 320  # two pairs side by side, two rows


def test_ground_truth_is_what_was_annotated(models, shapes):
    cfg = load_config(models["panoptic"][0])
    record = Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]).dataset._records[0]
    segments = ground_truth(cfg, record).segments
    annotation = json.loads((shapes / "panoptic.json").read_text())["annotations"][0]
    expected = [s["area"] for s in annotation["segments_info"] if not s["iscrowd"]]
    names = class_table(cfg).names
    by_name = {}
    for s in segments:
        by_name[names[s.label]] = by_name.get(names[s.label], 0) + s.mask.sum()
    assert sum(by_name.values()) == sum(expected)
    categories = {c["id"]: c["name"] for c in json.loads((shapes / "panoptic.json").read_text())["categories"]}
    for name in by_name:
        ids = [i for i, n in categories.items() if n == name]
        areas = [s["area"] for s in annotation["segments_info"] if s["category_id"] in ids and not s["iscrowd"]]
        assert by_name[name] == sum(areas)


def test_drawing_paints_masks_and_nothing_else(models):
    classes = class_table(load_config(models["panoptic"][0]))
    image = np.full((400, 400, 3), 100, np.uint8)
    mask = np.zeros((400, 400), bool)
    mask[100:300, 100:300] = True
    drawn = draw_segments(image, [Segment.from_mask(mask, 0)], classes)
    assert drawn.shape == image.shape
    assert (drawn[110:150, 110:290] != 100).any(axis=-1).all()
    assert (drawn[:95] == 100).all() and (drawn[305:] == 100).all() and (drawn[:, :95] == 100).all()


def test_sheet_keeps_every_picture():
    pictures = [np.full((30, 40, 3), v, np.uint8) for v in (50, 100, 150)]
    sheet = picture_sheet(pictures, 2, "title")
    for value in (50, 100, 150):
        assert (sheet == value).all(axis=-1).sum() >= 30 * 40
