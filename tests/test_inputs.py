"""What knet_d2.load(...) takes as an image, and what can be done with its predictions."""

import contextlib
import io
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import spread_scores, tiny_config, tiny_model
from PIL import Image

import knet_d2
from knet_d2.checkpoint import describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data.classes import ClassTable
from knet_d2.data.pixels import PixelFormat
from knet_d2.errors import ConfigError, DataError
from knet_d2.inference import Prediction, Segment
from knet_d2.inference import inputs as inputs_module
from knet_d2.inference.inputs import read_input

RGB = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
FORMATS = {name: PixelFormat(name) for name in ("RGB", "BGR", "L", "4-channel")}


def png(image=RGB, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def server():
    """Serves /image.png, /large, /slow, /cut (off), /to_file (which leads to a file: address) and /missing."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            if self.path == "/to_file":
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
                self.end_headers()
                return
            if self.path == "/again":
                self.send_response(302)
                self.send_header("Location", "/image.png")
                self.end_headers()
                return
            if self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):  # until the client leaves
                    for _ in range(500):
                        self.wfile.write(b"0")
                        time.sleep(0.01)
                return
            if self.path == "/cut":
                self.send_response(200)
                self.send_header("Content-Length", "99999")
                self.end_headers()
                self.wfile.write(png())
                return
            content = {"/image.png": png(), "/large": b"0" * 5000}.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def kinds(tmp_path, server):
    """The same picture in each form, with the order that has to be stated."""
    path = tmp_path / "image.png"
    path.write_bytes(png())
    opened = Image.open(path)
    return {
        "path": (path, None),
        "text": (str(path), None),
        "address": (f"{server}/image.png", None),
        "address that leads on": (f"{server}/again", None),
        "bytes": (png(), None),
        "bytearray": (bytearray(png()), None),
        "memoryview": (memoryview(png()), None),
        "BytesIO": (io.BytesIO(png()), None),
        "open file": (open(path, "rb"), None),
        "PIL": (opened, None),
        "PIL with alpha": (Image.fromarray(RGB).convert("RGBA"), None),
        "array": (RGB, "RGB"),
        "BGR array": (RGB[:, :, ::-1], "BGR"),
        "float array": (RGB / np.float32(255), "RGB"),
        "tensor": (torch.from_numpy(RGB).permute(2, 0, 1), "RGB"),
        "float tensor": (torch.from_numpy(RGB / np.float32(255)).permute(2, 0, 1), "RGB"),
        "BGR tensor": (torch.from_numpy(RGB[:, :, ::-1].copy()).permute(2, 0, 1).requires_grad_(False), "BGR"),
    }


@pytest.mark.parametrize("name", ["RGB", "BGR", "L"])
def test_every_form_gives_the_same_pixels(tmp_path, server, name):
    expected = FORMATS[name].prepare(RGB, "")
    for form, (image, order) in kinds(tmp_path, server).items():
        found = read_input(image, order, FORMATS[name])
        assert found.dtype == np.uint8 and np.array_equal(found, expected), form


def test_pil_images_of_other_modes_are_read_as_their_files(tmp_path):
    gray = Image.fromarray(RGB[:, :, 0])
    palette = Image.fromarray(RGB).quantize(16)
    for image in (gray, palette, gray.convert("1"), Image.fromarray(RGB[:, :, 0].astype(np.uint16) * 257)):
        image.save(tmp_path / "image.png")
        for name in ("RGB", "L"):
            from_file = read_input(tmp_path / "image.png", None, FORMATS[name])
            assert np.array_equal(read_input(image, None, FORMATS[name]), from_file), (image.mode, name)
    turned = Image.fromarray(RGB)
    turned.getexif()[0x0112] = 6
    assert read_input(turned, None, FORMATS["RGB"]).shape == (60, 40, 3)
    assert np.array_equal(read_input(png(np.dstack([RGB, RGB[:, :, :1]])), None, FORMATS["4-channel"])[..., :3], RGB)


@pytest.mark.parametrize(
    "image, order, message",
    [
        (None, None, "The image is of type NoneType; use a path, an http.s. address"),
        (3, None, "The image is of type int"),
        ({"image": 1}, None, "The image is of type dict"),
        (io.StringIO("text"), None, "open it in binary mode"),
        (b"no image", None, "it is no image that can be read"),
        (png()[:200], None, "can't be read"),
        (torch.zeros(3, 8, 8), None, "say how an array's channels are ordered"),
        (torch.zeros(8, 8, 3), "RGB", "the number of channels is 8"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), "RGB", "is no image"),
        (torch.full((3, 8, 8), 7.0), "RGB", "INPUT.VALUE_RANGE"),
        (Image.fromarray(RGB), "RGB", "is for arrays and tensors; that of a Image is known"),
        (b"abc", "RGB", "is for arrays and tensors; that of a bytes is known"),
        ("absent.png", None, "absent.png does not exist"),
        ("ftp://host/image.png", None, "addresses must begin with http:// or https://"),
    ],
)
def test_anything_else_is_one_sentence(image, order, message):
    with pytest.raises(DataError, match=message) as caught:
        read_input(image, order, FORMATS["RGB"])
    assert "\n" not in str(caught.value)


def test_addresses_have_limits(server, monkeypatch):
    for path, message in (("/missing", "404"), ("/to_file", "can't be downloaded"), ("/large", "no image")):
        with pytest.raises(DataError, match=message):
            read_input(server + path, None, FORMATS["RGB"])
    with pytest.raises(DataError, match="/cut: can't be downloaded .IncompleteRead"):
        read_input(f"{server}/cut", None, FORMATS["RGB"])
    monkeypatch.setattr(inputs_module, "_MOST_SECONDS", 0.1)
    with pytest.raises(DataError, match="/slow: can't be downloaded .not complete after 0.1 seconds"):
        read_input(f"{server}/slow", None, FORMATS["RGB"])
    monkeypatch.setattr(inputs_module, "MAX_DOWNLOAD", 4000)
    with pytest.raises(DataError, match="/large: is larger than"):
        read_input(f"{server}/large", None, FORMATS["RGB"])
    with pytest.raises(DataError, match="http://127.0.0.1:9/x.png: can't be downloaded"):
        read_input("http://127.0.0.1:9/x.png", None, FORMATS["RGB"])


# ---- the predictor


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    options = {"INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 96, "MODEL.KNET.NUM_STAGES": 1}
    ids = {"MODEL.KNET.THING_CATEGORY_IDS": [0, 1, 2], "MODEL.KNET.STUFF_CATEGORY_IDS": []}
    cfg = tiny_config("instance", {**options, **ids})
    model = spread_scores(tiny_model("instance", {**options, **ids}).eval())
    path = str(tmp_path_factory.mktemp("weights") / "model.pth")
    save_weights(path, model.state_dict(), describe_model(cfg))
    return path


def test_one_image_and_lists(weights, tmp_path):
    predictor = knet_d2.load(weights, device="cpu", confidence_threshold=0)
    single = predictor(RGB, order="RGB")
    assert isinstance(single, Prediction) and np.array_equal(single.picture, RGB) and single.segments
    both = predictor([png(), Image.fromarray(RGB)])
    assert isinstance(both, list) and len(both) == 2 and predictor([]) == []
    for prediction in (*both, *predictor((RGB, torch.from_numpy(RGB).permute(2, 0, 1)), order="RGB")):
        assert np.array_equal(prediction.masks(), single.masks())
        assert [x.score for x in prediction.segments] == [x.score for x in single.segments]
    assert {x.name for x in single.segments} <= set(predictor.classes.names)
    tiled = predictor(RGB, order="RGB", tile_size=32)
    assert all(x.name == predictor.classes.names[x.label] for x in tiled.segments) and tiled.picture is not None
    assert all(x.name for x in next(iter(predictor.predict(RGB).values())).segments)


@pytest.mark.parametrize("threshold", [0, 0.0, 1, 1.0])
def test_thresholds_at_the_ends(weights, threshold):
    found = knet_d2.load(weights, device="cpu", confidence_threshold=threshold)(RGB, order="RGB")
    assert all(x.score >= threshold for x in found.segments) and bool(found.segments) == (threshold == 0)


# ---- predictions

CLASSES = ClassTable(["cup", "fork"], [0, 1], [(200, 0, 0), (0, 0, 200)], 2)


def prediction(picture=RGB):
    """A square with a small second part, and a bar."""
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 5:15, 10:30] = masks[0, 20:22, 10:12] = True
    masks[1, 30:34, 40:50] = True
    segments = [Segment.from_mask(mask, i, score) for i, (mask, score) in enumerate(zip(masks, (0.9, 0.456)))]
    return Prediction((40, 60), segments, CLASSES, picture).named()


def test_a_segment_has_name_box_mask_and_polygon():
    first, second = prediction().segments
    assert (first.name, second.name) == ("cup", "fork") and first.box == (10, 5, 20, 17)
    assert first.polygon.shape[1] == 2 and len(first.polygons()) == 2
    low, high = first.polygon.min(axis=0), first.polygon.max(axis=0)
    assert np.allclose(low, (10, 5), atol=0.5) and np.allclose(high, (30, 15), atol=0.5)
    assert repr(second) == "Segment('fork', score 0.46, box (40, 30, 10, 4), 40 pixels)"
    assert repr(prediction()) == "Prediction(40 x 60: 1 cup, 1 fork)"
    assert repr(prediction()._replace(segments=[])) == "Prediction(40 x 60: nothing)"


def test_pictures(tmp_path, monkeypatch):
    found, shown = prediction(), []
    drawn = found.drawn()
    assert np.array_equal(drawn, found.draw(RGB)) and not np.array_equal(drawn[:, :, 0], drawn[:, :, 1])
    found.save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), drawn)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found._repr_png_()))), drawn)
    monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(np.asarray(image)))
    found.show()
    assert np.array_equal(shown[0], drawn)
    with pytest.raises(DataError, match=r"x\.txt: .*ends in .png or .jpg"):
        found.save(str(tmp_path / "x.txt"))
    without = prediction(picture=None)
    assert without._repr_png_() is None
    with pytest.raises(DataError, match="has no picture: call draw"):
        without.save(tmp_path / "y.png")


def test_supervision(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ConfigError, match="pip install supervision"):
        prediction().to_supervision()
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    found = prediction().to_supervision()
    assert found.xyxy.tolist() == [[10, 5, 30, 22], [40, 30, 50, 34]] and found.mask.shape == (2, 40, 60)
    assert found.class_id.tolist() == [0, 1] and found.data["class_name"].tolist() == ["cup", "fork"]
    assert found.confidence == pytest.approx([0.9, 0.456])
    assert prediction()._replace(segments=[]).to_supervision().xyxy.shape == (0, 4)
