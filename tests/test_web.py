"""The web page: what it shows and refuses, and, where Gradio is installed, the page itself."""

import json
import os
import re
import signal
import urllib.error
import urllib.request
from types import SimpleNamespace

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from helpers import spread_scores, tiny_config
from PIL import Image
from program_helpers import ROOT
from pycocotools.coco import COCO

import knet_d2
from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data import resolve_classes
from knet_d2.data.pixels import PixelFormat
from knet_d2.errors import ConfigError
from knet_d2.programs import web

NUM_STAGES = {"panoptic": 2, "semantic": 1}


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    """Of a panoptic model with two stages, and a semantic one with a single stage."""
    paths = []
    for task, num_stages in NUM_STAGES.items():
        test = {"MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0, "INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 96}
        cfg = tiny_config(task, {**test, "MODEL.KNET.NUM_STAGES": num_stages})
        resolve_classes(cfg)
        torch.manual_seed(0)
        model = knet_d2.KNet(cfg)
        if task == "panoptic":
            spread_scores(model)
        paths.append(str(tmp_path_factory.mktemp("run") / "model_final.pth"))
        save_weights(paths[-1], model.state_dict(), describe_model(cfg))
    models = web.load_models(paths, None, ["MODEL.DEVICE", "cpu"])
    assert list(models) == [f"run{i}/model_final.pth" for i in range(2)]
    return web.Viewer(models, max_megapixels=0.01)


def random_image(size, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (*size, 3), np.uint8)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(random_image((60, 84))).save(path)
    return str(path)


def test_tasks_of_each_model(viewer):
    titles = [choice.split(" ")[0] for choice in viewer.choices()]
    assert titles == ["panoptic", "instances", "semantic", "semantic"]
    assert [viewer.num_stages(choice) for choice in viewer.choices()] == [2, 2, 2, 1]


def test_description(viewer):
    first, second = viewer.description().splitlines()
    assert first.startswith("- **run0&#47;model&#95;final&#46;pth** (5 classes): ") and first.count(", ") == 4
    names = list(viewer._models["run1/model_final.pth"].classes.names)
    assert re.sub(r"&#(\d+);", lambda x: chr(int(x[1])), second).endswith(", ".join(names))


def test_files_to_download(viewer, photo, tmp_path):
    view = viewer.view(photo, list(viewer.choices())[1], 0.0, 2)
    picture, masks = web.write_files(view, str(tmp_path))
    assert (os.path.basename(picture), os.path.basename(masks)) == ("photo_segments.png", "photo_masks.json")
    assert (np.asarray(Image.open(picture)) == view.picture).all() and json.load(open(masks))["annotations"]
    assert web.write_files(viewer.view(None, list(viewer.choices())[1], 0.0, 2), str(tmp_path)) == [None, None]


def test_what_is_shown_is_what_the_model_finds(viewer, photo):
    panoptic, instances, _, semantic = viewer.choices()
    model = viewer._models["run0/model_final.pth"]
    passes = []
    hook = model.model.backbone.register_forward_hook(lambda *_: passes.append(1))
    shown = {}
    for choice, output in ((panoptic, "panoptic_seg"), (instances, "instances")):
        for threshold in (0.0, 0.6):
            for stage in (0, 1, 2):
                shown[output, threshold, stage] = viewer.view(photo, choice, threshold, stage)
    hook.remove()
    assert len(passes) == 1  # for all stages, thresholds and tasks of an image
    trace = model.trace(photo)
    for (output, threshold, stage), view in shown.items():
        expected = trace.prediction(threshold, stage=stage, output=output)
        assert [row[:3] for row in view.rows] == [
            [x["category_name"], round(x["score"], 3), x["area"]] for x in expected.to_coco()
        ]
        assert f"{len(expected.segments)} segments" in view.message and view.num_stages == 2
    assert 0 < len(shown["instances", 0.6, 2].rows) < len(shown["instances", 0.0, 2].rows)
    assert "static kernels" in shown["instances", 0.0, 0].message

    # A model with fewer stages shows its last one
    last = viewer.view(photo, semantic, 0.3, 2)
    assert last.num_stages == 1 and "stage 1 of 1" in last.message
    assert sum(row[2] for row in last.rows) == 60 * 84 and {row[1] for row in last.rows} == {""}
    assert last.picture.shape == (6 * 60, 6 * 84, 3)


def test_coco_file(viewer, photo, tmp_path):
    view = viewer.view(photo, list(viewer.choices())[1], 0.0, 2)
    (tmp_path / "masks.json").write_text(json.dumps(view.coco))
    coco = COCO(str(tmp_path / "masks.json"))
    assert coco.loadImgs([1])[0] == {"id": 1, "file_name": "photo.png", "height": 60, "width": 84}
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert len(annotations) == len(view.rows) > 1
    for annotation, (name, score, pixels, *box) in zip(annotations, view.rows):
        mask = coco.annToMask(annotation)
        assert mask.shape == (60, 84) and mask.sum() == pixels and annotation["bbox"] == box
        assert mask_util.toBbox(annotation["segmentation"]).tolist() == box
        assert coco.loadCats([annotation["category_id"]])[0]["name"] == name
        assert annotation["score"] == pytest.approx(score, abs=5e-4)


def test_large_images_are_made_smaller(viewer, tmp_path):
    """Here to 0.01 megapixels; the masks are of the size that the message and the file tell."""
    Image.fromarray(random_image((1, 1)).repeat(200, 0).repeat(300, 1)).save(tmp_path / "a.png")
    view = viewer.view(str(tmp_path / "a.png"), list(viewer.choices())[0], 0.0, 2)
    assert "122 x 81 pixels" in view.message  # 9,882 of them
    assert (view.coco["images"][0]["height"], view.coco["images"][0]["width"]) == (81, 122)
    assert view.coco["annotations"][0]["segmentation"]["size"] == [81, 122]


def test_bad_uploads_are_messages(viewer, photo, tmp_path):
    choice = list(viewer.choices())[0]

    def message_of(name, content):
        (tmp_path / name).write_bytes(content)
        view = viewer.view(str(tmp_path / name), choice, 0.3, 2)
        assert view.picture is None and view.rows == [] and view.coco is None
        assert name in view.message and str(tmp_path) not in view.message
        return view.message

    png = (tmp_path / "photo.png").read_bytes()
    assert "no image that can be read" in message_of("junk.png", b"junk")
    assert "no image that can be read" in message_of("empty.jpg", b"")
    assert "no image that can be read" in message_of("page.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "no image that can be read" in message_of("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert "truncated" in message_of("half.png", png[: len(png) // 2])
    # Small files with many pixels are refused before these are unpacked
    for side in (10001, 20000):
        Image.new("1", (side, side)).save(tmp_path / "large.png")
        assert "up to 100 megapixels" in message_of("large.png", (tmp_path / "large.png").read_bytes())
    assert viewer.view(None, choice, 0.3, 2).message == "Upload an image, or click an example."
    # After all this, the next one works
    assert viewer.view(photo, choice, 0.0, 2).rows


def test_an_unexpected_failure_is_a_message(viewer, photo, monkeypatch, caplog):
    def fail(*_):
        raise MemoryError("no room for it")

    monkeypatch.setattr(web, "read_upload", fail)
    viewer._trace.cache_clear()
    view = viewer.view(photo, list(viewer.choices())[0], 0.3, 2)
    assert "can't be segmented" in view.message and view.picture is None and "no room for it" in caplog.text


def write_video(path, frames):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    return str(path)


def test_videos_are_followed(viewer, tmp_path, monkeypatch):
    """By panoptic models; the drawn video has the frames of the upload, up to a limit, and the ids are counted."""
    assert viewer.trackers() == ["run0/model_final.pth"]
    name, target = viewer.trackers()[0], str(tmp_path)
    path = write_video(tmp_path / "in.mp4", [random_image((64, 96))] * 4)
    message, drawn = viewer.follow(path, name, target)
    found = list(viewer._models[name].video(path))
    things = {x.track_id for frame in found for x in frame.segments if x.label < 3}
    assert message == f"{len(things)} objects in 4 frames." and things
    assert drawn == str(tmp_path / "in_tracked.mp4") and cv2.VideoCapture(drawn).get(cv2.CAP_PROP_FRAME_COUNT) == 4
    monkeypatch.setattr(web, "MAX_FRAMES", 2)
    message, drawn = viewer.follow(path, name, target)
    assert "in 2 frames; the page uses the first 2 frames." in message
    assert cv2.VideoCapture(drawn).get(cv2.CAP_PROP_FRAME_COUNT) == 2


def test_bad_videos_are_messages(viewer, tmp_path, monkeypatch):
    name = viewer.trackers()[0]
    (tmp_path / "junk.mp4").write_bytes(b"junk")
    message, drawn = viewer.follow(str(tmp_path / "junk.mp4"), name, str(tmp_path))
    assert "junk.mp4" in message and "can't be read" in message and str(tmp_path) not in message and drawn is None
    large = write_video(tmp_path / "large.mp4", [random_image((128, 128))])  # 0.016 megapixels; the limit is 0.01
    message, drawn = viewer.follow(large, name, str(tmp_path))
    assert "megapixels" in message and drawn is None
    assert viewer.follow(None, name, str(tmp_path)) == ("Upload a video.", None)


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20] = 255
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = web.read_upload(str(tmp_path / "turned.jpg"), 1, PixelFormat("RGB"))
    assert image.shape == (60, 40, 3) and image[:, 25:].min() > 250 and image[:, :15].max() < 5
    assert web.read_upload(str(tmp_path / "turned.jpg"), 0.0006, PixelFormat("RGB")).shape == (30, 20, 3)


def test_models_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "load", lambda path, **_: path)
    paths = ["a/run/m.pth", "b/run/m.pth", "knet://coco/instance/knet_r50"]
    models = web.load_models(paths, None, [])
    assert models == dict(zip(["run/m.pth", "run/m.pth 2", "instance/knet_r50"], paths))


def test_uploads_go_when_the_page_is_stopped(tmp_path, monkeypatch, capsys):
    """Service managers stop the page by SIGTERM."""
    folders = []

    def build_page(viewer, folder, examples):
        folders.append(folder)
        return SimpleNamespace(block_thread=lambda: os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(web, "build_page", build_page)
    monkeypatch.setattr(web, "serve", lambda page, host, port: f"http://{host}:{port}/")
    monkeypatch.setattr(web, "load_models", lambda *args: {})
    monkeypatch.setattr(web, "Viewer", lambda *args: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            web.main(web.get_parser().parse_args(["--weights", "model.pth"]))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 143
    assert len(folders) == 1 and not os.path.exists(folders[0])


# ---- with Gradio -----------------------------------------------------------------------------------------------


def get(address):
    """Status and content."""
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def segment(address, path, choice):
    """Ask for the segments of a file on the server: the event that answers, and its data."""
    body = json.dumps({"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, choice, 0.0, 1]}).encode()
    request = urllib.request.Request(f"{address}gradio_api/call/segment", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        number = json.load(response)["event_id"]
    answer = get(f"{address}gradio_api/call/segment/{number}")[1].decode()
    return re.search(r"event: (complete|error)\ndata: (.*)", answer).groups()


def test_page(viewer, photo, tmp_path, monkeypatch):
    """Upload, predict and download by HTTP as a browser does; nothing else is contacted, no other file is given out."""
    pytest.importorskip("gradio")
    import socket

    contacted = set()
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda s, to: (contacted.add(to[0]), connect(s, to))[1])
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")
    folder = tmp_path / "served"
    folder.mkdir()
    page = web.build_page(viewer, str(folder), [photo])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = web.serve(page, "127.0.0.1", port)
    try:
        with pytest.raises(ConfigError, match=f"--port {port}"):
            web.serve(web.build_page(viewer, str(folder)), "127.0.0.1", port)
        from gradio_client import Client, handle_file

        client = Client(address, download_files=str(tmp_path / "downloads"), verbose=False)
        choice = list(viewer.choices())[1]
        shown = client.predict(handle_file(photo), choice, 0.0, 1, api_name="/segment")
        message, picture, rows, png, download, stage = shown
        expected = viewer.view(photo, choice, 0.0, 1)
        assert message == expected.message and rows["data"] == expected.rows
        assert (np.asarray(Image.open(picture).convert("RGB")) == expected.picture).all()
        assert (np.asarray(Image.open(png["value"])) == expected.picture).all()
        assert json.loads(open(download["value"]).read()) == json.loads(json.dumps(expected.coco))
        assert stage["value"] == 1 and stage["maximum"] == 2

        (tmp_path / "junk.png").write_bytes(b"junk")
        message = client.predict(handle_file(str(tmp_path / "junk.png")), choice, 0.0, 1, api_name="/segment")[0]
        assert "junk.png: it is no image" in message

        video = write_video(tmp_path / "in.mp4", [random_image((64, 96))] * 3)
        message, download = client.predict(handle_file(video), viewer.trackers()[0], api_name="/follow")
        assert "in 3 frames" in message and cv2.VideoCapture(download["value"]).read()[0]

        # Files outside the page's folder: neither by address nor as input
        assert get(f"{address}gradio_api/file={photo}")[0] == 403
        assert get(f"{address}gradio_api/file={ROOT}/setup.py")[0] == 403
        assert get(f"{address}gradio_api/file={folder}/../photo.png")[0] == 403
        assert segment(address, photo, choice)[0] == "error"
        assert segment(address, f"{address}theme.css", choice)[0] == "error"
        uploaded = next(folder.glob("*/photo.png"))
        event, data = segment(address, str(uploaded), choice)
        assert event == "complete" and expected.message in data
        content = get(address)[1].decode()
        assert "fonts.googleapis.com/css" not in content
        assert "(5 classes): " in content and "Examples: click one" in content
    finally:
        page.close()
    assert contacted <= {"127.0.0.1", "localhost", "::1"}
