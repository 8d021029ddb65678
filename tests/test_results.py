"""Predictions, their files and pictures; sources and sinks, also with unusual names and wrong paths."""

import base64
import csv
import functools
import io
import json
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Instances
from PIL import Image

from knet_d2.data.classes import ClassTable
from knet_d2.data.pixels import PixelFormat
from knet_d2.errors import ConfigError, DataError
from knet_d2.inference.sinks import CsvFile, JsonFile, JsonLines, MaskFiles, PictureFiles, Stop, VideoFile
from knet_d2.inference.sources import Frame, ImageFiles, Video
from knet_d2.programs import demo
from knet_d2.results import Prediction, Segment, main_prediction, predictions_of
from knet_d2.results.pictures import Drawn, draw_segments, inner_point, write_labels
from knet_d2.results.video import VideoDrawer

HOSTILE_NAMES = [
    "$10_bill_$20_bill",
    "$x",
    r"\alpha",
    "<script>alert(1)</script>",
    "two\nlines",
    "\u202eright to left",
    "🙂",
    "x" * 300,
    "../../etc/passwd",
    "{brace",
    "",
]
SIZE = (40, 50)


def table(names, num_things=None):
    colors = [(10 * i % 255, 100, 200) for i in range(len(names))]
    return ClassTable(list(names), list(range(len(names))), colors, len(names) if num_things is None else num_things)


def square(top, left, side, label, score=0.5):
    mask = np.zeros(SIZE, bool)
    mask[top : top + side, left : left + side] = True
    return Segment.from_mask(mask, label, score)


def test_rle_is_that_of_pycocotools():
    """To the letter, also where the mask begins or ends with the image."""
    rng = np.random.RandomState(0)
    masks = [rng.rand(*rng.randint(1, 9, 2)) > rng.rand() for _ in range(300)]
    for mask in [*masks, *(np.ones(shape, bool) for shape in ((1, 1), (3, 4)))]:
        segment = Segment.from_mask(mask, 0)
        if segment is not None:
            expected = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert segment.rle() == {"size": list(mask.shape), "counts": expected["counts"].decode()}


def noise(size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def test_thing_and_stuff_ids_may_be_the_same():
    """As in Detectron2's coco_2017_*_panoptic_separated."""
    classes = ClassTable(["cat", "dog", "sky", "grass"], [0, 1, 0, 1], [(0, 0, 0)] * 4, 2)
    ids = torch.tensor([[1, 2], [3, 4]])
    infos = [
        {"id": 1, "isthing": False, "category_id": 1, "score": 0.5},
        {"id": 2, "isthing": True, "category_id": 1, "score": 0.6},
        {"id": 3, "isthing": True, "category_id": 0, "score": 0.7},
        {"id": 4, "isthing": False, "category_id": 0, "score": 0.8},
    ]
    prediction = main_prediction({"panoptic_seg": (ids, infos)}, classes)
    assert [classes.names[x.label] for x in prediction.segments] == ["grass", "dog", "cat", "sky"]
    assert [x.corner for x in prediction.segments] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_every_output_becomes_a_prediction_in_the_order_of_the_outputs():
    classes = table(["a", "b"], num_things=1)
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 3:7, 5:6] = True  # the other one is empty
    things = {"pred_classes": torch.zeros(2).long(), "scores": torch.tensor([0.9, 0.8])}
    instances = Instances(SIZE, pred_masks=masks, **things)
    scores = torch.zeros(3, *SIZE)  # with a plane for the background behind the classes
    scores[2, :20] = 1
    scores[1, 20:] = 1
    outputs = {"sem_seg": scores, "instances": instances, "panoptic_seg": (torch.zeros(SIZE), [])}
    found = predictions_of(outputs, classes)
    assert list(found) == ["sem_seg", "instances", "panoptic_seg"]
    assert [x.box for x in found["instances"].segments] == [(5, 3, 1, 4)]
    assert [(x.label, x.score, x.area) for x in found["sem_seg"].segments] == [(1, None, 20 * 50)]
    assert found["panoptic_seg"].segments == [] and {p.size for p in found.values()} == {SIZE}


def test_confident_leaves_stuff():
    classes = table(["thing", "stuff"], num_things=1)
    segments = [square(0, 0, 5, 0, 0.2), square(5, 5, 5, 0, 0.4), square(10, 10, 5, 1, 0.1)]
    kept = Prediction(SIZE, segments, classes).confident(0.3)
    assert [x.score for x in kept.segments] == [0.4, 0.1]


def test_labels_are_inside_and_beside_each_other():
    """At the edges of the picture, and for two objects at one place; the first one's colour is that of its class."""
    size = (100, 120)

    def white(corners):
        segments = [square(0, 0, 9, 0)._replace(corner=corner, size=size) for corner in corners]
        items = [Drawn(x, (0, 0, 0), "a name", False) for x in segments]
        return (write_labels(np.zeros((*size, 3), np.uint8), items) > 200).sum()

    corners = [(0, 0), (91, 0), (0, 111), (91, 111), (45, 50), (46, 51)]
    assert white(corners) == 6 * white([(45, 50)]) > 0  # none is cut off, and none lies on another
    segments, classes = [square(0, 0, 9, 0), square(18, 20, 9, 0), square(19, 21, 7, 0)], table(["a long name"])
    drawn = draw_segments(np.zeros((400, 500, 3), np.uint8), [square(0, 0, 9, 0)._replace(size=(400, 500))], classes)
    assert (drawn[2, 2] == np.array(classes.colors[0]) // 2).all() and (drawn[0, :9] == 255).all()
    with_others = draw_segments(np.zeros((400, 500, 3), np.uint8), segments, classes)
    assert (with_others[2, 2] == drawn[2, 2]).all()


def test_things_of_a_class_have_shades_of_its_colour_and_stuff_has_not():
    size, corners = (400, 400), [(y, 100) for y in (0, 100, 200, 300)]
    segments = [square(0, 0, 50, 0)._replace(corner=corner, size=size) for corner in corners]
    classes = table(["a"])
    drawn = draw_segments(np.zeros((*size, 3), np.uint8), segments, classes)
    shades = [tuple(drawn[y + 3, x + 3]) for y, x in corners]
    color = np.array(classes.colors[0])
    assert shades[0] == shades[3] == tuple(color // 2) and len(set(shades)) == 3
    assert np.allclose(shades[1], (0.6 * color + 0.4 * 255) / 2, atol=1) and np.allclose(shades[2], 0.3 * color, atol=1)
    drawn = draw_segments(np.zeros((*size, 3), np.uint8), segments, classes._replace(num_things=0))
    assert {tuple(drawn[y + 3, x + 3]) for y, x in corners} == {tuple(color // 2)}


def test_the_background_of_masks_keeps_its_pixels():
    """Its name is written; a thing of that name is painted."""
    picture = np.full((400, 500, 3), 90, np.uint8)
    background = square(0, 0, 9, 0, None)._replace(crop=np.ones((400, 500), bool), size=(400, 500))
    cell = square(10, 10, 20, 1, None)._replace(size=(400, 500))
    for num_things, painted in ((0, False), (2, True)):
        classes = table(["Background", "cell"], num_things)
        prediction = Prediction((400, 500), [background, cell], classes)
        for drawn in (prediction.draw(picture), VideoDrawer(classes).draw(picture, prediction)):
            assert (drawn[300:, 300:] != 90).all() == painted and (drawn[11:29, 11:29, 0] != 90).mean() > 0.9
            assert (drawn[:, 40:] > 200).any()


def test_a_label_lies_in_its_segment():
    """Where the mean of the pixels does not: a ring, and lines that are one pixel wide."""
    ring = np.zeros((200, 300), bool)
    ring[10:190, 10:290] = True
    ring[30:170, 30:270] = False
    lines = np.zeros((200, 300), bool)
    lines[101, 1:299] = True
    lines[1:199, 7] = True
    for mask in (ring, lines, lines[::-1], lines.T):
        x, y = inner_point(Segment.from_mask(mask, 0))
        assert mask[max(y - 5, 0) : y + 6, max(x - 5, 0) : x + 6].any()


def test_lines_of_json(tmp_path):
    classes = table(["thing", "stuff"], num_things=1)
    prediction = Prediction(SIZE, [square(5, 5, 20, 0), square(0, 30, 9, 1, None)], classes)
    stream = io.StringIO()
    sink = JsonLines(stream, {"task": "panoptic"}, classes)
    frame = Frame("a.jpg", noise())
    sink.write(frame, {"panoptic_seg": prediction})
    sink.write(frame, {"instances": prediction})
    head, panoptic, instances = map(json.loads, stream.getvalue().splitlines())
    assert [x["name"] for x in head["categories"]] == ["thing", "stuff"]
    kind, data = panoptic["panoptic"]["file_name"].split(",")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert kind == "data:image/png;base64" and (pixels[:, :, 0] == prediction.segment_map()).all()
    assert instances["instances"][0]["segmentation"] == prediction.segments[0].rle()

    class Ended(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    with pytest.raises(Stop):
        JsonLines(Ended(), {}, classes)


def test_rows_of_csv(tmp_path):
    classes, path = table(["thing", "stuff"], num_things=1), tmp_path / "objects.csv"
    sink = CsvFile(str(path), classes)
    segments = [square(5, 7, 20, 0)._replace(track_id=3), square(0, 30, 9, 1, None)]
    sink.write(Frame("a, b.jpg", noise()), {"panoptic_seg": Prediction(SIZE, segments, classes)})
    sink.write(Frame("c.jpg", noise()), {"panoptic_seg": Prediction(SIZE, [], classes)})
    sink.close()
    things, stuff = csv.DictReader(path.read_text().splitlines())
    score, box = f"{segments[0].score:.4f}", {"x": "7", "y": "5", "width": "20", "height": "20"}
    share = {"share": f"{400 / 2000:.6f}"}
    assert things == {
        "image": "a, b.jpg",
        "class": "thing",
        "score": score,
        "area": "400",
        **share,
        **box,
        "track": "3",
    }
    assert (stuff["class"], stuff["score"], stuff["area"], stuff["track"]) == ("stuff", "", "81", "")


def test_standard_output_has_json_alone(monkeypatch, capfd):
    def predict(args, lines):
        os.write(1, b"a line of a log\n")
        print("{}", file=lines)
        return 0

    monkeypatch.setattr(demo, "predict", predict)
    assert demo.main(demo.get_parser().parse_args(["--input", "a.jpg", "--json", "-"])) == 0
    os.write(1, b"later\n")
    assert capfd.readouterr() == ("{}\nlater\n", "a line of a log\n")


def test_streams(tmp_path):
    """A stream over HTTP has no number of frames; an address is shown without its password."""
    path = str(tmp_path / "a.mp4")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 10, SIZE[::-1])
    for _ in range(3):
        writer.write(noise())
    writer.release()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        video = Video(f"http://user:secret@127.0.0.1:{server.server_port}/a.mp4")
        assert video.count is None and video.rate == 10
        names = [frame.name for frame in video]
        assert len(names) == 3 and names[0] == f"http://127.0.0.1:{server.server_port}/a.mp4#0"
        with pytest.raises(DataError, match=r"^http://127.0.0.1:\d+/b.mp4 can't be read as a video. Check the address"):
            Video(f"http://user:secret@127.0.0.1:{server.server_port}/b.mp4")
        server.shutdown()


@pytest.mark.parametrize("head", [b"#EXTM3U\n", b"\xef\xbb\xbf#EXTM3U\n", b"ffconcat version 1.0\n"])
def test_a_playlist_is_no_video(tmp_path, head):
    """FFmpeg would open the files that it names, wherever they are."""
    write_video(tmp_path / "secret.avi", 3)
    assert Video(str(tmp_path / "secret.avi")).count == 3
    line = b"file " if head.startswith(b"ff") else b"#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
    (tmp_path / "list.m3u8").write_bytes(head + line + str(tmp_path / "secret.avi").encode() + b"\n#EXT-X-ENDLIST\n")
    with pytest.raises(DataError, match="list.m3u8: is a playlist"):
        Video(str(tmp_path / "list.m3u8"))


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name)[:20])
def test_names_are_drawn_and_written_as_they_are(name, tmp_path):
    classes = table([name])
    prediction = Prediction(SIZE, [square(5, 5, 20, 0)], classes)
    picture = draw_segments(noise(), prediction.segments, classes)
    assert picture.shape[0] >= 320
    assert VideoDrawer(classes).draw(noise(), prediction).shape == (*SIZE, 3)
    writer = JsonFile(str(tmp_path / "r.json"), {}, classes)
    writer.write(Frame(name or "x", noise()), {"instances": prediction})
    writer.close()
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["categories"][0]["name"] == name and prediction.to_coco()[0]["category_name"] == name


def test_json_is_valid_after_every_image(tmp_path):
    path, classes = tmp_path / "results.json", table(["a", "b"], num_things=1)
    prediction = Prediction(SIZE, [square(0, 0, 5, 0), square(10, 10, 7, 1, None)], classes)
    writer = JsonFile(str(path), {"task": "panoptic"}, classes)
    assert json.loads(path.read_text())["images"] == []
    for count in (1, 2, 3):
        writer.write(Frame(f"{count}.jpg", noise()), {"panoptic_seg": prediction, "sem_seg": prediction})
        images = json.loads(path.read_text())["images"]
        assert [x["file_name"] for x in images] == [f"{i}.jpg" for i in range(1, count + 1)]
    writer.close()
    segments = images[1]["panoptic"]["segments_info"]
    assert [(x["id"], x["category_id"], x["isthing"], x["area"]) for x in segments] == [
        (1, 0, True, 25),
        (2, 1, False, 49),
    ]
    png = np.asarray(Image.open(tmp_path / "results_panoptic" / images[1]["panoptic"]["file_name"])) @ [1, 256, 65536]
    assert (png == prediction.segment_map()).all()
    assert [mask_util.area(x["segmentation"]) for x in images[2]["semantic"]] == [25, 49]


def save_images(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(noise()).save(folder / name)
    return folder


def test_pictures_never_replace_their_inputs(tmp_path):
    photos = save_images(tmp_path / "photos", "a.jpg", "b.png")
    (tmp_path / "link").symlink_to(photos)
    inputs = ImageFiles([str(photos)], PixelFormat("RGB")).paths
    for output in (photos, tmp_path / "link"):
        with pytest.raises(ConfigError, match="this would replace"):
            PictureFiles(str(output), inputs)
    with pytest.raises(ConfigError, match="this would replace"):
        PictureFiles(inputs[0], inputs[:1])
    with pytest.raises(OSError):
        PictureFiles(str(photos / "a.jpg" / "x"), inputs)  # below a file
    PictureFiles(str(tmp_path / "new" / "c.png"), inputs[:1]).write(
        Frame(inputs[0], noise()), {"instances": Prediction(SIZE, [], table(["a"]))}
    )
    assert os.listdir(tmp_path / "new") == ["c.png"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody can create files")
def test_a_folder_that_takes_no_files_is_told_at_once(tmp_path):
    """The folder exists, so only trying to write there shows it."""
    with pytest.raises(OSError):
        PictureFiles("/proc/self", [str(tmp_path / "a.png"), str(tmp_path / "b.png")])


def test_class_map_has_the_class_of_the_best_segment():
    # The best is drawn over the other: 100 - 9 pixels of class 2, 9 + 16 of class 0
    found = Prediction(
        SIZE, [square(2, 2, 3, 0, 0.9), square(0, 0, 10, 2, 0.5), square(20, 20, 4, 0, 0.4)], table("abc")
    )
    classes = found.class_map()
    assert classes.dtype == np.int32 and classes[3, 3] == 0 and classes[0, 0] == 2 and classes[39, 0] == -1
    assert np.unique(classes, return_counts=True)[1].tolist() == [2000 - 116, 25, 91]
    assert (found.class_map(void=255) == np.where(classes < 0, 255, classes)).all()


@pytest.mark.parametrize("num_classes, void, mode", [(3, 255, "L"), (255, 255, "L"), (256, 65535, "I;16")])
def test_masks_are_png_files_of_classes_or_instances(tmp_path, num_classes, void, mode):
    inputs = [str(tmp_path / name) for name in ("a.jpg", "b.png", "a.png")]
    folder, last = tmp_path / "masks", num_classes - 1
    found = Prediction(SIZE, [square(0, 0, 10, last), square(20, 20, 4, 0, 0.4)], table(["x"] * num_classes))
    sink = MaskFiles(str(folder), inputs, num_classes, ignore=255)
    for name, output in zip(inputs, ("sem_seg", "panoptic_seg", "instances"), strict=True):
        sink.write(Frame(name, noise()), {output: found})
    assert sorted(os.listdir(folder)) == ["a.png", "a_1.png", "b.png"]
    semantic, panoptic, instances = (np.asarray(Image.open(folder / x)) for x in ("a.png", "b.png", "a_1.png"))
    assert Image.open(folder / "a.png").mode == mode
    assert semantic[0, 0] == last and semantic[20, 20] == 0 and (semantic == void).sum() == 2000 - 116
    assert (panoptic == semantic).all()
    assert Image.open(folder / "a_1.png").mode == "I;16" and np.bincount(instances.ravel()).tolist() == [1884, 100, 16]


def test_masks_replace_neither_images_nor_pictures(tmp_path):
    photos = save_images(tmp_path / "photos", "a.png")
    inputs = [str(photos / "a.png")]
    with pytest.raises(ConfigError, match="--masks .*photos: this would replace"):
        MaskFiles(str(photos), inputs, 3, 255)
    pictures = PictureFiles(str(tmp_path / "out"), inputs)
    with pytest.raises(ConfigError, match="--masks .*out: this would replace"):
        MaskFiles(str(tmp_path / "out"), inputs, 3, 255, pictures.paths)


def test_a_file_is_tried_at_once_and_its_folder_made(tmp_path):
    (tmp_path / "file").touch()
    for sink in (lambda path: JsonFile(path, {}, table(["a"])), lambda path: CsvFile(path, table(["a"]))):
        with pytest.raises(OSError):
            sink(str(tmp_path / "file" / "r.json"))
        sink(str(tmp_path / "new" / "r.json")).close()
        assert (tmp_path / "new" / "r.json").read_bytes()


def write_video(path, count, fourcc="MJPG"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 10, SIZE[::-1])
    for i in range(count):
        writer.write(noise(seed=i))
    writer.release()


def test_a_video_that_is_cut_off_counts_as_failed(tmp_path, caplog):
    write_video(tmp_path / "whole.avi", 30)
    content = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    whole, cut = Video(str(tmp_path / "whole.avi")), Video(str(tmp_path / "cut.avi"))
    names = [frame.name for frame in whole]
    assert names == [f"{tmp_path}/whole.avi#{i}" for i in range(30)] and whole.failed == 0
    assert 5 < len(list(cut)) < 25 and cut.failed > 3 and "cut.avi" in caplog.text
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(DataError, match="text.avi"):
        Video(str(tmp_path / "text.avi"))


@pytest.mark.parametrize(("times", "varies"), [([0, 33, 67, 100], False), ([0, 33, 133, 166], True), ([0] * 4, False)])
def test_a_frame_rate_that_varies_is_told(tmp_path, caplog, monkeypatch, times, varies):
    """All frames are given, and one line says so; times that are not known say nothing."""
    write_video(tmp_path / "in.avi", 4)
    found = iter(times)
    monkeypatch.setattr(Video, "_milliseconds", lambda self: next(found))
    assert len(list(Video(str(tmp_path / "in.avi")))) == 4
    assert ("33 to 100 ms between frames" in caplog.text) is varies
    assert len(caplog.records) == varies


def test_the_json_never_replaces_an_input(tmp_path):
    photos = save_images(tmp_path / "photos", "a.jpg")
    source, weights = ImageFiles([str(photos)], PixelFormat("RGB")), str(tmp_path / "w.pth")
    config = SimpleNamespace(MODEL=SimpleNamespace(KNET=SimpleNamespace(TASK="instance"), WEIGHTS=weights))
    predictor = SimpleNamespace(cfg=config, classes=table(["a"]))
    before = (photos / "a.jpg").read_bytes()
    for path in (source.paths[0], weights):
        args = demo.get_parser().parse_args(["--input", "x", "--json", path])
        with pytest.raises(ConfigError, match=f"--json {path}: this would replace {path}"):
            demo.build_sinks(args, source, predictor)
    assert (photos / "a.jpg").read_bytes() == before


def test_a_video_file_is_tried_at_once_and_checked_in_the_end(tmp_path, monkeypatch):
    write_video(tmp_path / "in.avi", 4)
    source, classes = Video(str(tmp_path / "in.avi")), table(["a"])
    with pytest.raises(ConfigError, match="can't write a video there"):
        VideoFile(str(tmp_path), source, classes)
    with pytest.raises(ConfigError, match="would replace"):
        VideoFile(str(tmp_path / "in.avi"), source, classes)
    sink = VideoFile(str(tmp_path / "new" / "out.mp4"), source, classes)
    for frame in source:
        sink.write(frame, {"instances": Prediction(SIZE, [square(0, 0, 9, 0)], classes)})
    sink._count += 1  # as if the disk had taken one frame less
    with pytest.raises(DataError, match="4 of 5 frames"):
        sink.close()
