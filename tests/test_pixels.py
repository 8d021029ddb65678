"""Images of 8 and 16 bits, of floats, of one, three and more channels, from the file to the exported model."""

import json
import random
import struct
import subprocess
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from data_helpers import data_cfg
from helpers import spread_scores, tiny_config, tiny_model
from PIL import Image
from program_helpers import write_config

import knet_d2
from checks import exports
from knet_d2.checkpoint import Checkpointer, describe_model
from knet_d2.checkpoint.saving import save_weights
from knet_d2.data import files, resolve_classes
from knet_d2.data.augmentation import ResizeTransform, build_augmentations
from knet_d2.data.check.images import ImageEntry, check_images
from knet_d2.data.color import ColorAugmentation
from knet_d2.data.files import read_image, read_picture
from knet_d2.data.mapper import KNetDatasetMapper
from knet_d2.data.pixels import PixelFormat
from knet_d2.data.shapes.writer import write_shapes
from knet_d2.errors import CheckpointError, ConfigError, DataError
from knet_d2.inference.detectron2_predictor import Predictor
from knet_d2.programs import check_dataset, demo, export_model, train, web
from tools import onnx_runner

FORMATS = ("RGB", "BGR", "L", "3-channel")
SIZE = (40, 52)


def photo(channels=3, seed=0, size=SIZE):
    """Blurred noise, uint8."""
    noise = np.random.RandomState(seed).randint(0, 256, (5, 6, channels), np.uint8)
    return np.dstack([cv2.resize(noise[:, :, i], size[::-1]) for i in range(channels)])


def as_bgr(image):
    return np.ascontiguousarray(image[:, :, ::-1])


def write_pages(path, image, **options):
    """A TIFF with a page for each channel."""
    first, *others = [Image.fromarray(np.ascontiguousarray(image[:, :, i])) for i in range(image.shape[2])]
    first.save(path, save_all=True, append_images=others, **options)


def write_chunky(path, image, photometric=1, extra=(), orientation=1):
    """A TIFF with all channels in one page, as satellites have them."""
    height, width, channels = image.shape
    kind, data = {"u": 1, "i": 2, "f": 3}[image.dtype.kind], image.tobytes()
    tags = {
        256: [width], 257: [height], 258: [8 * image.itemsize] * channels, 259: [1], 262: [photometric], 273: [0],
        274: [orientation], 277: [channels], 278: [height], 279: [len(data)], 284: [1], 338: extra,
        339: [kind] * channels,
    }  # fmt: skip
    tags = {tag: values for tag, values in tags.items() if values}
    place = 8 + 2 + 12 * len(tags) + 4
    tags[273] = [place + sum(4 * len(x) for x in tags.values() if len(x) > 1)]
    entries = blob = b""
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}I", *values)
        entries += struct.pack("<HHI", tag, 4, len(values))
        entries += packed if len(values) == 1 else struct.pack("<I", place + len(blob))
        blob += packed if len(values) > 1 else b""
    Path(path).write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + blob + data)


@pytest.fixture
def copies(tmp_path):
    """One photo in files of many types; the first one has 8 bits."""
    image = photo()
    short, real = image.astype(np.uint16) * 257, (image / 255).astype(np.float32)
    paths = [
        str(tmp_path / name) for name in ("8.png", "16.png", "16.tif", "f.tif", "8.npy", "16.npy", "f.npy", "f64.npy")
    ]
    Image.fromarray(image).save(paths[0])
    for path, pixels in zip(paths[1:4], (short, short, real)):
        assert cv2.imwrite(path, as_bgr(pixels))
    for path, pixels in zip(paths[4:], (image, short, real, image.transpose(2, 0, 1) / 255)):
        np.save(path, pixels)
    paths.append(str(tmp_path / "pages.tif"))
    write_pages(paths[-1], short, compression="tiff_lzw")
    return paths


# ---- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_photo_is_the_same_in_every_type(copies, name):
    expected = read_image(copies[0], name)
    assert expected.dtype == np.uint8 and expected.shape == (*SIZE, PixelFormat(name).channels)
    for path in copies:
        found = read_image(path, name)
        assert found.dtype == np.uint8 and np.array_equal(found, expected), path


@pytest.mark.parametrize(
    "suffix, pixels", [(".png", np.uint16), (".tif", np.uint16), (".tif", np.float32), (".npy", float)]
)
def test_a_ramp_keeps_its_levels_and_order(tmp_path, suffix, pixels):
    ramp = np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16)
    ramp = ramp if pixels == np.uint16 else (ramp / 65535).astype(pixels)
    path = str(tmp_path / f"ramp{suffix}")
    np.save(path, ramp) if suffix == ".npy" else Image.fromarray(ramp).save(path)
    for name in ("L", "1-channel", "RGB"):
        found = read_image(path, name)
        assert found.dtype == np.float32 and (found.min(), found.max()) == (0, 255)
        assert (np.diff(found[:, :, 0].ravel()) > 0).all()


def test_values_are_scaled_by_the_stated_range(tmp_path):
    path = str(tmp_path / "x.npy")
    wanted = PixelFormat("L", (-1000.0, 1000.0))
    for kind in (np.int16, np.int32, np.float64):
        np.save(path, np.array([[-1000, 0, 1000, 5000]], kind))
        assert read_image(path, wanted).ravel().tolist() == [0, 127.5, 255, 255]
    np.save(path, np.array([[0, 50, 100]], np.uint8))
    assert read_image(path, PixelFormat("L", (0.0, 100.0))).ravel().tolist() == [0, 127.5, 255]
    for pixels, message in (
        (np.zeros((2, 2), np.int32), "holds int32.*INPUT.VALUE_RANGE"),
        (np.full((2, 2), 200.0), "values from 200 to 200.*INPUT.VALUE_RANGE"),
        (np.full((2, 2), np.nan), "NaN"),
        (np.full((2, 2), "a"), "is no image"),
        (np.zeros((2, 2, 2, 2)), "is no image"),
        (np.zeros((0, 2)), "is no image|can't be read"),
    ):
        np.save(path, pixels)
        with pytest.raises(DataError, match=rf"x\.npy.*({message})"):
            read_image(path, "L")


@pytest.mark.parametrize(
    "mode, channels",
    [("1", 1), ("L", 1), ("LA", 2), ("P", 3), ("RGB", 3), ("RGBA", 4), ("I;16", 1), ("F", 1), ("pages", 5), ("npy", 7)],
)
def test_channels_of_a_file(tmp_path, mode, channels):
    """As many as the file has, and of another number one sentence; in colours alone, alpha is dropped."""
    path = str(tmp_path / {"F": "x.tif", "pages": "x.tif", "npy": "x.npy"}.get(mode, "x.png"))
    if mode == "npy":
        np.save(path, photo(channels))
    elif mode == "pages":
        write_pages(path, photo(channels))
    elif mode in ("I;16", "F"):
        grey = photo(1)[:, :, 0].astype(np.uint16 if mode == "I;16" else np.float32)
        Image.fromarray(grey / 255 if mode == "F" else grey * 257).save(path)
    else:
        Image.fromarray(photo()).convert("RGBA" if mode == "LA" else mode).convert(mode).save(path)
    assert read_image(path, f"{channels}-channel").shape == (*SIZE, channels)
    assert read_picture(path, f"{channels}-channel").shape == (*SIZE, 3)
    with pytest.raises(DataError, match=rf"x\..*channels is {channels}.*'6-channel' takes 6"):
        read_image(path, "6-channel")
    if channels <= 4:
        assert read_image(path, "RGB").shape == (*SIZE, 3) and read_image(path, "L").shape == (*SIZE, 1)
    else:
        with pytest.raises(DataError, match=f"channels is {channels}.*'RGB' takes 3"):
            read_image(path, "RGB")


@pytest.mark.parametrize("channels", [2, 4])
def test_16_bit_png_with_alpha(tmp_path, channels):
    image, path = photo(channels), str(tmp_path / "x.png")
    colors = image if channels == 4 else image[:, :, [0, 0, 0, 1]]
    for scale, kind in ((1, np.uint8), (257, np.uint16)):
        if channels == 4:
            assert cv2.imwrite(path, colors[:, :, [2, 1, 0, 3]].astype(kind) * scale)
        else:
            _write_grey_alpha_png(path, image.astype(kind) * scale)
        assert np.array_equal(read_image(path, f"{channels}-channel"), image)
        assert np.array_equal(read_image(path, "RGB"), colors[:, :, :3])


def _write_grey_alpha_png(path, image):
    """uint8 or uint16 [H, W, 2]; neither Pillow nor OpenCV write it with 16 bits."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = image.shape[:2]
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in image)
    header = struct.pack(">IIBBBBB", width, height, 8 * image.itemsize, 4, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [3, 4, 5])
def test_tiffs_with_all_channels_in_a_page(tmp_path, kind, channels):
    image = photo(channels)
    image = (image / 255).astype(kind) if kind == np.float32 else image.astype(kind) * (257 if kind == np.uint16 else 1)
    path = str(tmp_path / "x.tif")
    for photometric in (1, 2):
        write_chunky(path, image, photometric, [0] * (channels - (3 if photometric == 2 else 1)))
        try:
            found = read_image(path, f"{channels}-channel")
        except DataError as error:  # neither Pillow nor OpenCV read it, and they say so or give other channels
            assert "pip install tifffile" in str(error) and (photometric == 1 or channels > 3)
        else:
            assert np.array_equal(found, photo(channels))
    write_chunky(path, image[:, :, :3].copy(), 2, orientation=6)
    try:
        found = read_image(path, "RGB")
    except DataError as error:
        assert "pip install tifffile" in str(error) and kind != np.uint8
    else:
        assert np.array_equal(found, np.rot90(photo(channels)[:, :, :3], 3))


def test_a_tiff_of_very_many_pages_is_not_walked_through(tmp_path, monkeypatch):
    """A file of some megabytes has room for 100,000 pages of one pixel, which would take minutes."""
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)]
    page, size = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags), 2 + 12 * len(tags) + 4
    content, count = struct.pack("<2sHI8x", b"II", 42, 16), 3000
    for i in range(count):
        following = len(content) + size if i < count - 1 else 0
        content += struct.pack("<H", len(tags)) + page + struct.pack("<I", following)
    (tmp_path / "x.tif").write_bytes(content)
    loaded = []
    load = files.ImageFileDirectory_v2.load
    monkeypatch.setattr(files.ImageFileDirectory_v2, "load", lambda *x: loaded.append(x) or load(*x))
    with pytest.raises(DataError, match="more than 100 pages, each of which would be a channel"):
        read_image(str(tmp_path / "x.tif"), "RGB")
    assert len(loaded) < 150
    assert read_image(str(tmp_path / "x.tif"), "3000-channel").shape == (1, 1, 3000)


def test_overviews_are_no_channels(tmp_path):
    pages = [Image.fromarray(photo(1, size=size)[:, :, 0]) for size in ((40, 52), (20, 26), (10, 13))]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_image(str(tmp_path / "x.tif"), "L"), photo(1))


def test_a_dark_16_bit_image_is_said(tmp_path):
    path = str(tmp_path / "x.png")
    Image.fromarray(np.linspace(0, 4095, 4096).reshape(64, 64).astype(np.uint16)).save(path)
    _, faults = check_images([ImageEntry(path, "")], PixelFormat("L"))
    assert [x.kind for x in faults] == ["dark image"]
    assert not check_images([ImageEntry(path, "")], PixelFormat("L", (0.0, 4095.0)))[1]


def test_check_images_says_what_reading_says(tmp_path):
    write_pages(tmp_path / "x.tif", photo(5))
    _, faults = check_images([ImageEntry(str(tmp_path / "x.tif"), "image 3")], PixelFormat("RGB"))
    assert faults[0].kind == "unreadable image" and "channels is 5" in faults[0].what


# ---- hostile files -----------------------------------------------------------------------------------------------


def test_no_program_is_started_for_a_file(tmp_path, monkeypatch):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")

    def fail(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", fail)
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    for read in (lambda x: read_image(x, "RGB"), files.read_labels, files.read_panoptic):
        with pytest.raises(DataError, match=r"photo\.jpg can't be read.*use one of JPEG, PNG"):
            read(str(path))
    assert [x.kind for x in check_images([ImageEntry(str(path), "")], PixelFormat("RGB"))[1]] == ["unreadable image"]


def test_limits_hold_before_pixels_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_PIXELS", 1000)
    monkeypatch.setattr(files, "MAX_VALUES", 4000)
    for name, size, channels in (
        ("x.png", (40, 26), 1),
        ("x.tif", (40, 26), 2),
        ("y.tif", (40, 25), 5),
        ("x.npy", (40, 25), 5),
    ):
        path = str(tmp_path / name)
        if name == "x.npy":
            np.save(path, photo(channels, size=size))
        elif name == "x.png":
            Image.fromarray(photo(size=size)).save(path)
        else:
            write_pages(path, photo(channels, size=size))
        with pytest.raises(DataError, match="too large"):
            read_image(path, f"{channels}-channel")
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "j.npy").write_bytes(b"junk")
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (30000, 30000), }".ljust(117) + b"\n"
    (tmp_path / "h.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    circle = struct.pack("<H", 0) + struct.pack("<I", 8)
    (tmp_path / "c.tif").write_bytes(b"II*\0" + struct.pack("<I", 8) + circle)
    for name in ("o.npy", "j.npy", "h.npy", "c.tif"):
        with pytest.raises(DataError, match=f"{name}.*can't be read"):
            read_image(str(tmp_path / name), "RGB")


# ---- resizing and augmentation -----------------------------------------------------------------------------------


def test_bytes_are_resized_as_before_and_floats_the_same_way():
    image = photo(size=(120, 90))
    for channels in (1, 3):
        pixels = image[:, :, :channels]
        pillow = Image.fromarray(pixels.squeeze()).resize((41, 50), Image.BILINEAR)
        resized = ResizeTransform(120, 90, 50, 41).apply_image(pixels)
        assert np.array_equal(resized, np.asarray(pillow).reshape(50, 41, channels))
    deep = (image + 0.25).astype(np.float32)
    assert np.abs(ResizeTransform(120, 90, 50, 41).apply_image(deep) - 0.25 - resized).max() < 1.5
    five = photo(5, size=(120, 90))
    resized = ResizeTransform(120, 90, 50, 41).apply_image(five)
    for channel in range(5):
        assert np.array_equal(resized[:, :, channel], ResizeTransform(120, 90, 50, 41).apply_image(five[:, :, channel]))


def test_no_channel_is_taken_for_alpha():
    """Pillow's resize weights colours by alpha."""
    image = np.zeros((40, 40, 4), np.uint8)
    image[::2, :, :3], image[1::2, :, 3] = 200, 255
    assert ResizeTransform(40, 40, 20, 20).apply_image(image)[5, 5].tolist() == [100, 100, 100, 128]


def test_color_augmentation_of_floats_is_that_of_bytes():
    image = photo()
    augmentation, deep = ColorAugmentation("RGB"), image.astype(np.float32)
    for seed in range(12):
        random.seed(seed)
        expected = augmentation.apply_image(image)
        random.seed(seed)
        found = augmentation.apply_image(deep)
        assert found.dtype == np.float32 and 0 <= found.min() and found.max() <= 255
        assert np.abs(found - expected).mean() < 3, seed


@pytest.mark.parametrize("name", ["L", "5-channel"])
def test_color_augmentation_needs_colours(name):
    cfg = data_cfg("instance", resolve=False)
    cfg.INPUT.FORMAT, cfg.INPUT.COLOR_AUG_SSD = name, True
    with pytest.raises(ConfigError, match=r"INPUT\.COLOR_AUG_SSD.*False"):
        build_augmentations(cfg, True)


# ---- config and weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, key",
    [
        ({"INPUT.FORMAT": "XYZ"}, "INPUT.FORMAT"),
        ({"INPUT.FORMAT": "0-channel"}, "INPUT.FORMAT"),
        ({"INPUT.FORMAT": "L"}, "MODEL.PIXEL_MEAN"),
        ({"INPUT.FORMAT": "L", "MODEL.PIXEL_MEAN": [100.0]}, "MODEL.PIXEL_STD"),
        ({"INPUT.FORMAT": "5-channel"}, "MODEL.PIXEL_MEAN"),
        ({"INPUT.VALUE_RANGE": [5]}, "INPUT.VALUE_RANGE"),
        ({"INPUT.VALUE_RANGE": [9, 5]}, "INPUT.VALUE_RANGE"),
        ({"INPUT.VALUE_RANGE": [0, float("inf")]}, "INPUT.VALUE_RANGE"),
        ({"INPUT.VALUE_RANGE": ["a", "b"]}, "INPUT.VALUE_RANGE"),
    ],
)
def test_keys_that_make_no_sense(options, key):
    with pytest.raises(ConfigError, match=key):
        tiny_model("instance", options)


def options_of(channels):
    return {
        "INPUT.FORMAT": {1: "L", 3: "RGB"}.get(channels, f"{channels}-channel"),
        "MODEL.PIXEL_MEAN": [110.0] * channels,
        "MODEL.PIXEL_STD": [50.0] * channels,
    }


@pytest.mark.parametrize("channels", [1, 2, 5, 6])
def test_the_first_layer_is_adapted_in_training(tmp_path, channels):
    three = tiny_model("semantic", options_of(3))
    Checkpointer(three, str(tmp_path)).save("three")
    path = str(tmp_path / "three.pth")
    model = tiny_model("semantic", options_of(channels), seed=1)
    with pytest.raises(CheckpointError, match="another shape"):
        Checkpointer(model).load(path)
    checkpointer = Checkpointer(model, partial=True)
    checkpointer.load(path)
    assert [x.name for x in checkpointer.report.reshaped] == ["backbone.stem.conv1.weight"]
    image = torch.rand(1, 1, 32, 32)
    expected = three.eval().backbone(image.expand(-1, 3, -1, -1))["res4"]
    if channels in (1, 6):  # equal channels give what three equal channels gave
        found = model.eval().backbone(image.expand(-1, channels, -1, -1))["res4"]
        assert torch.allclose(found, expected, atol=1e-4)
    weight, old = model.backbone.stem.conv1.weight, three.backbone.stem.conv1.weight
    if channels == 1:
        assert torch.allclose(weight[:, 0], old.sum(dim=1))
    else:
        for i in range(channels):
            assert torch.allclose(weight[:, i], old[:, i % 3] * 3 / channels)


# ---- prediction --------------------------------------------------------------------------------------------------


def test_arrays_and_files_of_every_type_give_one_result(copies, tmp_path):
    predictor = saved_model(tmp_path, 3)
    seen = []
    predictor.model.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]["image"].clone()))
    for path in copies:
        predictor(path)
    image = photo()
    for pixels in (image, image.astype(np.uint16) * 257, (image / 255).astype(np.float32)):
        predictor(pixels, order="RGB")
        predictor(as_bgr(pixels), order="BGR")
    list(predictor.images(copies))
    mapper = KNetDatasetMapper.from_config(predictor.cfg, False)
    mapped = KNetDatasetMapper(**mapper)({"file_name": copies[1]})["image"]
    assert len(seen) == 2 * len(copies) + 6 and all(torch.equal(x, mapped.float()) for x in seen)


def saved_model(folder, channels, task="panoptic"):
    options = {**options_of(channels), "INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 96, "MODEL.KNET.NUM_STAGES": 1}
    cfg = tiny_config(task, options)
    resolve_classes(cfg)
    model = spread_scores(tiny_model(task, options))
    save_weights(str(folder / "model.pth"), model.state_dict(), describe_model(cfg))
    return knet_d2.load(folder / "model.pth", device="cpu", confidence_threshold=0.0)


@pytest.mark.parametrize("channels", [1, 5])
def test_test_time_augmentation_tiles_and_the_page(tmp_path, channels):
    predictor = saved_model(tmp_path, channels)
    path = str(tmp_path / "x.npy")
    np.save(path, photo(channels).astype(np.uint16) * 250)
    assert predictor(path, tile_size=32).size == SIZE
    assert predictor(photo(channels)).size == SIZE
    viewer = web.Viewer({"model": predictor}, max_megapixels=0.001)
    view = viewer.view(path, next(iter(viewer.choices())), 0.0, 1)
    assert view.picture is not None and view.picture.shape[2] == 3, view.message
    augmented = knet_d2.load(
        tmp_path / "model.pth", device="cpu", opts=["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 80)"]
    )
    assert augmented(path).size == SIZE
    bad = str(tmp_path / "bad.npy")
    np.save(bad, photo(2))
    message = viewer.view(bad, next(iter(viewer.choices())), 0.0, 1).message
    assert "bad.npy" in message and "channels is 2" in message and str(tmp_path) not in message


def test_detectron2s_predictor_takes_arrays_of_every_type(tmp_path):
    predictor = Predictor(saved_model(tmp_path, 3).cfg)
    image = as_bgr(photo())
    expected = predictor(image)["panoptic_seg"][0]
    assert torch.equal(predictor(image.astype(np.uint16) * 257)["panoptic_seg"][0], expected)


# ---- whole runs --------------------------------------------------------------------------------------------------

# Task, INPUT.FORMAT, INPUT.VALUE_RANGE, the suffix of the files and what their images are turned into
KINDS = {
    "16 bits": (
        *("instance", "RGB", [], ".png"),
        lambda x: as_bgr(x.astype(np.uint16) * 257 + (x < 255) * np.uint16(11)),
    ),
    "floats": ("instance", "RGB", [], ".tif", lambda x: as_bgr((x / 256).astype(np.float32))),
    "one channel of 12 bits": (
        *("semantic", "L", [0, 4095], ".png"),
        lambda x: x.mean(axis=2).astype(np.uint16) * 16,
    ),
    "five channels": (
        *("semantic", "5-channel", [0.0, 500.0], ".npy"),
        lambda x: x[:, :, [0, 1, 2, 1, 0]] * np.float32(1.7),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_from_training_to_onnxruntime(tmp_path, kind):
    """Checked, trained, evaluated, drawn, predicted, and exported with the same results at other sizes, too."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    task, name, value_range, suffix, convert = KINDS[kind]
    write_shapes(str(tmp_path), 4, seed=5, size=64)
    config = _converted(tmp_path, task, suffix, convert)
    channels = PixelFormat(name).channels
    options = ["INPUT.FORMAT", name, "INPUT.VALUE_RANGE", str(value_range), "OUTPUT_DIR", str(tmp_path / "out")]
    options += ["MODEL.PIXEL_MEAN", str([110.0] * channels), "MODEL.PIXEL_STD", str([60.0] * channels)]
    options += ["INPUT.COLOR_AUG_SSD", str(channels == 3), "MODEL.RESNETS.DEPTH", "18", "MODEL.KNET.NUM_STAGES", "1"]
    options += ["MODEL.RESNETS.RES4_DILATION", "1", "MODEL.RESNETS.RES5_DILATION", "1"]

    check = check_dataset.get_parser().parse_args(
        ["--config-file", config, "--output", str(tmp_path / "check"), "--opts", *options]
    )
    assert check_dataset.main(check) == 0
    assert json.loads((tmp_path / "check" / "report.json").read_text())["faults"] == []

    arguments = [
        "--config-file",
        config,
        *options,
        "SOLVER.MAX_ITER",
        "2",
        "TEST.EVAL_PERIOD",
        "2",
        "TEST.NUM_PICTURES",
        "1",
    ]
    train.main(train.get_parser().parse_args(arguments))
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert any("segm/AP" in line or "sem_seg/mIoU" in line for line in metrics)

    weights = str(tmp_path / "out" / "model_final.pth")
    images = sorted(str(x) for x in (tmp_path / "images").iterdir())
    arguments = [
        "--input",
        str(tmp_path / "images"),
        "--output",
        str(tmp_path / "drawn"),
        "--opts",
        "MODEL.WEIGHTS",
        weights,
    ]
    assert demo.main(demo.get_parser().parse_args([*arguments, "MODEL.DEVICE", "cpu"])) == 0
    assert len(list((tmp_path / "drawn").iterdir())) == 4

    exported = str(tmp_path / "model.onnx")
    opts = ["--image-type", "float32", "--confidence-threshold", "0"]
    export_model.main(export_model.get_parser().parse_args([weights, exported, *opts]))
    arguments = [weights, exported, "--images", *images[:2], "--sizes", "50x70", *opts]
    assert exports.main(exports.get_parser().parse_args(arguments)) == 0
    runner = onnx_runner.OnnxRunner(exported)
    seen = {}
    runner.session = _Spy(runner.session, seen)
    predictor = knet_d2.load(weights, device="cpu", confidence_threshold=0.0)
    predictor.model.register_forward_pre_hook(lambda _, args: seen.update(ours=args[0][0]["image"].numpy()))
    for path in images:
        expected, found = predictor(path), runner(onnx_runner.read(path, name))
        height, width = seen["ours"].shape[1:]
        assert seen["theirs"].dtype == np.float32
        assert np.abs(seen["theirs"][0, :, :height, :width] - seen["ours"]).max() < 1e-3
        if task == "instance":
            scores = sorted((x.score for x in found if x.mask.any()), reverse=True)
            assert scores and scores == pytest.approx(
                sorted((x.score for x in expected.segments), reverse=True), abs=1e-3
            )
        else:
            masks = {x.name: x.mask for x in found}
            for segment in expected.segments:
                assert (masks[predictor.classes.names[segment.label]] == segment.mask).mean() > 0.99


class _Spy:
    """An onnxruntime session that notes its input."""

    def __init__(self, session, seen):
        self._session, self._seen = session, seen

    def get_outputs(self):
        return self._session.get_outputs()

    def run(self, names, inputs):
        self._seen["theirs"] = inputs["image"]
        return self._session.run(names, inputs)


def _converted(folder, task, suffix, convert):
    """The data set with its images in another type; the path of the config."""
    content = json.loads((folder / "instances.json").read_text())
    for image in content["images"]:
        path = folder / "images" / image["file_name"]
        target = path.with_suffix(suffix)
        image["file_name"] = target.name
        pixels = convert(np.asarray(Image.open(path).convert("RGB")))
        path.unlink()
        np.save(target, pixels) if suffix == ".npy" else cv2.imwrite(str(target), pixels)
    (folder / "instances.json").write_text(json.dumps(content))
    return write_config(folder, folder, task)
