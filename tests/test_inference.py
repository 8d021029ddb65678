"""knet_d2.load: self-contained weights files, predictions of files, folders, arrays and tiles."""

import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import spread_scores, tiny_config, tiny_model
from PIL import Image
from pycocotools.coco import COCO

import knet_d2
from knet_d2.checkpoint import Checkpointer, describe_model, load_file, read_description
from knet_d2.checkpoint.saving import save_weights
from knet_d2.checkpoint.zoo import build_on_meta
from knet_d2.data import resolve_classes
from knet_d2.data.classes import ClassTable
from knet_d2.errors import CheckpointError, ConfigError, DataError
from knet_d2.export.graph import ExportableKNet
from knet_d2.inference import Prediction, Segment
from knet_d2.inference.from_file import threshold_options
from knet_d2.inference.sources import Video
from knet_d2.inference.tiles import predict_tiles, tile_spans
from knet_d2.programs import convert_checkpoint

NAMES = {"things": ["cup", "fork", "spoon"], "stuff": ["table", "wall"]}
OPTIONS = {
    "MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "MODEL.KNET.NUM_STAGES": 2,
}


@pytest.fixture
def dataset():
    """Name of a data set that is registered while the model is described, and gone when its file is loaded."""
    name = "inference_toy"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(
        thing_classes=NAMES["things"],
        stuff_classes=[*NAMES["things"], *NAMES["stuff"]],
        thing_colors=[(1, 2, 3), (4, 5, 6), (7, 8, 9)],
        thing_dataset_id_to_contiguous_id={10: 0, 20: 1, 30: 2},
        stuff_dataset_id_to_contiguous_id={40: 3, 50: 4},
    )
    yield name
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def described(dataset, tmp_path):
    """A tiny panoptic model, and the function that saves it with its description under a name."""
    cfg = tiny_config("panoptic", {**OPTIONS, "DATASETS.TRAIN": (dataset,), "OUTPUT_DIR": "/secret"})
    resolve_classes(cfg)
    model = spread_scores(tiny_model("panoptic", OPTIONS).eval())
    metadata = describe_model(cfg)
    DatasetCatalog.remove(dataset)
    MetadataCatalog.remove(dataset)

    def save(name):
        path = str(tmp_path / name)
        save_weights(path, model.state_dict(), metadata)
        return path

    return model, save


def test_the_file_is_read_once(described, monkeypatch):
    read = []

    def counted(path, *args):
        read.append(path)
        return load_file(path, *args)

    for module in ("knet_d2.inference.from_file", "knet_d2.checkpoint.checkpointer"):
        monkeypatch.setattr(f"{module}.load_file", counted)
    path = described[1]("m.pth")
    knet_d2.load(path, device="cpu")
    assert read == [path]


def test_options_that_the_weights_were_not_trained_with_are_told(described, caplog):
    """They fit any parameters: a model takes images with red and blue exchanged without an error."""
    path = described[1]("m.pth")

    def told(load):
        caplog.clear()
        load()
        return [x for x in caplog.messages if "was trained with" in x]

    def predictor(*opts):
        return lambda: knet_d2.load(path, device="cpu", opts=opts)

    def fine_tuning(options):
        cfg = tiny_config("panoptic", {**OPTIONS, **options})
        resolve_classes(cfg)
        model = tiny_model("panoptic", {**OPTIONS, **options})
        return lambda: Checkpointer(model, partial=True, metadata=describe_model(cfg)).load(path)

    assert told(predictor()) == told(fine_tuning({})) == []
    first = f"INPUT.FORMAT = RGB: {path} was trained with BGR. Set it to BGR, or results get worse."
    assert told(predictor("INPUT.FORMAT", "RGB")) == told(fine_tuning({"INPUT.FORMAT": "RGB"})) == [first]
    (scale,) = told(predictor("MODEL.PIXEL_STD", "[58.0, 57.0, 57.0]"))
    assert scale.startswith("MODEL.PIXEL_STD = [58.0, 57.0, 57.0]:") and "was trained with [" in scale
    assert told(fine_tuning({"MODEL.PIXEL_STD": [58.0, 57.0, 57.0]})) == []
    other = {"MODEL.KNET.UPDATE_HEAD.NUM_HEADS": "2", "MODEL.KNET.POSITION_ENCODING": "none"}
    found = told(predictor(*(x for item in other.items() for x in item), "MODEL.KNET.TEST.SCORE_THRESHOLD", "0.9"))
    assert sorted(x.split(":")[0] for x in found) == sorted(f"{key} = {value}" for key, value in other.items())


def random_image(size, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (*size, 3), np.uint8)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_is_all_it_takes(described, ending):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    model, save = described
    predictor = knet_d2.load(save(f"model.{ending}"), device="cpu", confidence_threshold=0.0)
    assert predictor.classes.names == [*NAMES["things"], *NAMES["stuff"]]
    assert (predictor.classes.category_ids, predictor.classes.num_things) == ([0, 1, 2, 3, 4], 3)
    assert predictor.classes.colors[:3] == [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert {k: v.tolist() for k, v in predictor.model.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    image = random_image((64, 80))
    prediction = predictor(image, order="RGB")
    model.postprocessor.options = model.postprocessor.options._replace(thing_score_threshold=0.0)
    with torch.no_grad():
        expected, info = model([{"image": torch.from_numpy(image.transpose(2, 0, 1)).flip(0)}])[0]["panoptic_seg"]
    assert cfg_format(predictor) == "BGR" and len(info) == len(prediction.segments) > 1
    for number, (segment, wanted) in enumerate(zip(prediction.segments, info), start=1):
        assert (segment.label, segment.area) == (wanted["category_id"], wanted["area"])
        assert segment.score == pytest.approx(wanted["score"])
        assert (segment.mask == (expected.numpy() == wanted["id"])).all()
        assert ((prediction.segment_map() == number) == segment.mask).all()


def cfg_format(predictor):
    return predictor.cfg.INPUT.FORMAT


def test_description_has_no_places_of_the_machine_that_wrote_it(dataset):
    cfg = tiny_config(
        "panoptic", {"DATASETS.TRAIN": (dataset,), "OUTPUT_DIR": "/secret", "MODEL.WEIGHTS": "/secret/x.pth"}
    )
    resolve_classes(cfg)
    metadata = describe_model(cfg)
    assert "secret" not in str(metadata) and dataset not in str(metadata)
    assert metadata["knet_d2_version"] == knet_d2.__version__
    assert [x["name"] for x in json.loads(metadata["classes"])] == [*NAMES["things"], *NAMES["stuff"]]
    content = {"model": build_on_meta(cfg).state_dict(), "metadata": metadata}
    restored = read_description(content, "x.pth").cfg
    for section in ("KNET", "RESNETS", "FPN", "SEM_SEG_HEAD"):
        assert restored.MODEL[section] == cfg.MODEL[section]


def test_checkpoints_of_a_training_are_self_contained(tmp_path):
    cfg = tiny_config("instance")
    model = tiny_model("instance")
    Checkpointer(model, str(tmp_path), metadata=describe_model(cfg)).save("model", iteration=3)
    predictor = knet_d2.load(tmp_path / "model.pth", device="cpu", confidence_threshold=0.0)
    assert predictor.cfg.MODEL.KNET.TASK == "instance"
    assert "iteration" in load_file(str(tmp_path / "model.pth"))
    convert_checkpoint.main(
        convert_checkpoint.get_parser().parse_args([str(tmp_path / "model.pth"), str(tmp_path / "small.pth")])
    )
    assert set(load_file(str(tmp_path / "small.pth"))) == {"model", "metadata"}
    assert knet_d2.load(tmp_path / "small.pth", device="cpu").classes == predictor.classes


def test_a_folder_stands_for_its_best_weights(tmp_path):
    cfg, model = tiny_config("instance"), tiny_model("instance")
    with pytest.raises(CheckpointError, match="this folder has no model_best.pth or model_final.pth"):
        knet_d2.load(tmp_path)
    for name in ("model_final_2.pth", "model_best_1.pth", "model_final_10.pth", "model_best_10.pth"):
        (tmp_path / name).touch()  # as training in a used folder renames them
    with pytest.raises(CheckpointError, match="the earlier run's model is .*/model_best_10.pth. Train first"):
        knet_d2.load(tmp_path)
    for number, name in enumerate(("model_final.pth", "model_best.pth")):
        next(model.parameters()).data.fill_(number)
        save_weights(str(tmp_path / name), model.state_dict(), describe_model(cfg))
        predictor = knet_d2.load(tmp_path, device="cpu")
        assert (next(predictor.model.parameters()) == number).all()
        assert predictor.cfg.MODEL.WEIGHTS == str(tmp_path / name)


def test_a_panoptic_model_without_stuff(tmp_path):
    """The number of stuff classes, 0, is not looked up in a data set."""
    cfg = tiny_config("panoptic", {"MODEL.KNET.NUM_STUFF_CLASSES": 0, "MODEL.KNET.THING_CATEGORY_IDS": [0, 1, 2]})
    resolve_classes(cfg)
    torch.manual_seed(0)
    save_weights(str(tmp_path / "m.pth"), knet_d2.KNet(cfg).state_dict(), describe_model(cfg))
    assert knet_d2.load(tmp_path / "m.pth", device="cpu").classes.num_things == 3


def test_files_that_do_not_describe_their_model(tmp_path, described):
    _, save = described
    path = save("model.pth")
    content = torch.load(path, weights_only=True)
    config = tmp_path / "config.yaml"
    config.write_text(tiny_config("panoptic", OPTIONS).dump())
    bare = str(tmp_path / "bare.pth")
    torch.save({"model": content["model"], "metadata": 5}, bare)
    with pytest.raises(CheckpointError, match=r"bare\.pth.*config_file"):
        knet_d2.load(bare)
    assert knet_d2.load(bare, config_file=str(config), device="cpu").classes.names == ["0", "1", "2", "3", "4"]

    def with_metadata(**changes):
        torch.save({"model": content["model"], "metadata": {**content["metadata"], **changes}}, bare)
        return bare

    newer = yaml.safe_dump({"MODEL": {"KNET": {"FROM_THE_FUTURE": 1}}})
    with pytest.raises(CheckpointError, match=r"bare\.pth.*FROM_THE_FUTURE.*9\.9"):
        knet_d2.load(with_metadata(config=newer, knet_d2_version="9.9"))
    with pytest.raises(CheckpointError, match=r"bare\.pth"):
        knet_d2.load(with_metadata(classes="[{}]"))
    with pytest.raises(CheckpointError, match=r"bare\.pth"):
        knet_d2.load(with_metadata(config="!!python/object/apply:os.mkdir [x]"))
    with pytest.raises(ConfigError, match="knet_r50_fpn_1x"):
        knet_d2.load("knet://coco/panoptic/knet_r50_fpn_1")


@pytest.mark.parametrize("threshold", [30, -0.1, float("nan")])
def test_a_threshold_that_is_no_score(threshold):
    """With 30, which is meant as percent, nothing would be found."""
    with pytest.raises(ConfigError, match="confidence_threshold = .*: use a score from 0 to 1"):
        knet_d2.load("m.onnx", confidence_threshold=threshold)
    with pytest.raises(ConfigError, match="use a score from 0 to 1"):
        threshold_options(threshold, ())


def test_the_order_of_channels_is_stated_and_checked(described, tmp_path):
    _, save = described
    predictor = knet_d2.load(save("m.pth"), device="cpu")
    rgb = random_image((64, 70))
    Image.fromarray(rgb).save(tmp_path / "image.png")
    seen = []
    predictor.model.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]["image"].clone()))
    predictor(tmp_path / "image.png")
    predictor(rgb, order="RGB")
    predictor(np.ascontiguousarray(rgb[:, :, ::-1]), order="BGR")
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    predictor(rgb, order="BGR")
    assert torch.equal(seen[0], seen[3].flip(0)) and not torch.equal(seen[0], seen[3])

    for order in (None, "rgb", "RGBA"):
        with pytest.raises(DataError, match="order='RGB'.*order='BGR'"):
            predictor(rgb, order=order)
    predictor(rgb[:, :, 0])
    assert torch.equal(seen[4], seen[0][2 if cfg_format(predictor) == "BGR" else 0].expand(3, -1, -1))
    for wrong, message in (
        (rgb.astype(np.float32), "INPUT.VALUE_RANGE"),
        (rgb.transpose(2, 0, 1), "channels is 70"),
        (np.zeros((4, 4, 4), np.uint8), "channels is 4"),
        (rgb[:0], r"expected integers or floats \[height, width, 3\]"),
        (rgb.astype(str), "is no image"),
    ):
        with pytest.raises(DataError, match=message):
            predictor(wrong, order="RGB")
    with pytest.raises(DataError, match=r"image\.png.*order"):
        predictor(tmp_path / "image.png", order="RGB")
    with pytest.raises(DataError, match=r"images\(folder\)"):
        predictor(tmp_path)
    with pytest.raises(DataError, match="absent.png"):
        predictor("absent.png")


def test_folders(described, tmp_path, caplog):
    _, save = described
    predictor = knet_d2.load(save("m.pth"), device="cpu")
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(random_image((40, 50), i)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    results = dict(predictor.images(str(folder)))
    assert list(results) == [str(folder / "0.png"), str(folder / "1.png")]
    assert "broken.jpg" in caplog.text
    assert all(prediction.size == (40, 50) for prediction in results.values())
    with pytest.raises(DataError, match="nothing"):
        list(predictor.images([str(tmp_path / "nothing*.png")]))


@pytest.mark.parametrize("threshold, different", [(0.0, 9), (0.6, 8)])  # static kernels have no score of 0.6
def test_one_pass_gives_every_stage_and_output(described, threshold, different):
    """The results equal those of models that are configured for a single stage and output."""
    _, save = described
    path, image = save("m.pth"), random_image((60, 84))
    predictor = knet_d2.load(path, device="cpu")
    passes = []
    predictor.model.backbone.register_forward_hook(lambda *_: passes.append(1))
    trace = predictor.trace(image, "RGB")
    assert trace.num_stages == 2 and predictor.outputs == ("panoptic_seg", "instances", "sem_seg")
    found = {}
    for output in predictor.outputs:
        for stage in (0, 1, 2, -1):
            opts = ["MODEL.KNET.TEST.STAGE", str(stage), "MODEL.KNET.TEST.OUTPUTS", f"['{output}']"]
            expected = knet_d2.load(path, device="cpu", confidence_threshold=threshold, opts=opts)(image, "RGB")
            got = trace.prediction(threshold, stage=stage, output=output)
            assert got.to_coco() == expected.to_coco() and got.size == (60, 84)
            found[output, stage] = got.to_coco()
    assert len(passes) == 1
    assert found["instances", 2] and len({str(x) for x in found.values()}) == different  # -1 is 2
    # What the predictor itself gives has not changed
    assert predictor(image, "RGB").to_coco() == trace.prediction(0.3).to_coco()
    for wrong, message in (({"stage": 3}, "stage = 3.*0 .static kernels. to 2"), ({"output": "boxes"}, "'boxes'")):
        with pytest.raises(ConfigError, match=message):
            trace.prediction(0.3, **wrong)
    augmented = knet_d2.load(path, device="cpu", opts=["TEST.AUG.ENABLED", "True"])
    with pytest.raises(ConfigError, match="TEST.AUG.ENABLED"):
        augmented.trace(image, "RGB")


def test_the_first_output_is_the_main_one_everywhere(described):
    _, save = described
    opts = ["MODEL.KNET.TEST.OUTPUTS", "['instances', 'panoptic_seg']"]
    predictor, image = knet_d2.load(save("m.pth"), device="cpu", opts=opts), random_image((60, 84))
    assert predictor.outputs == ("instances", "panoptic_seg", "sem_seg")
    both = predictor.predict(image)
    assert list(both) == ["instances", "panoptic_seg"] and both["instances"].to_coco() != both["panoptic_seg"].to_coco()
    expected = both["instances"].to_coco()
    assert predictor(image, "RGB").to_coco() == predictor.trace(image, "RGB").prediction(0.3).to_coco() == expected
    assert ExportableKNet(predictor.model).main_output == "instances"


# ---- masks -----------------------------------------------------------------------------------------------------

CLASSES = ClassTable(["cup", "table"], [7, 90], [(200, 0, 0), (0, 0, 200)], 1)


def blobs(size, seed, level=0.5):
    """A random smooth mask."""
    noise = cv2.GaussianBlur(np.random.RandomState(seed).rand(*size), (0, 0), 2.5)
    return noise > np.quantile(noise, level)


def without_holes(mask):
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED).astype(bool)


@pytest.mark.parametrize("seed", range(3))
def test_mask_formats(seed):
    masks = [blobs((45, 61), seed), np.zeros((45, 61), bool), without_holes(blobs((45, 61), seed + 10, 0.7))]
    masks[0][20, 20:30] = True  # a line, one pixel wide
    segments = [Segment.from_mask(mask, i % 2, 0.9 - i / 10) for i, mask in enumerate(masks)]
    assert segments[1] is None
    prediction = Prediction((45, 61), [segments[0], segments[2]], CLASSES)
    assert (prediction.masks() == np.stack([masks[0], masks[2]])).all()
    for record, mask in zip(prediction.to_coco(), (masks[0], masks[2])):
        assert (mask_util.decode(record["segmentation"]) == mask).all()
        ys, xs = mask.nonzero()
        assert record["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1] and record["area"] == mask.sum()
    truth = COCO()
    truth.dataset = prediction.to_coco_file("x.jpg")
    truth.createIndex()
    assert [x["image_id"] for x in prediction.to_coco()] == [0, 0]
    results = truth.loadRes(prediction.to_coco(image_id=1))  # as they are, results of this image
    assert (
        [x["image_id"] for x in truth.dataset["annotations"]]
        == [x["image_id"] for x in results.anns.values()]
        == [1, 1]
    )
    records = json.loads(json.dumps(prediction.to_coco("polygons")))
    assert [(x["category_id"], x["category_name"], x["score"]) for x in records] == [(7, "cup", 0.9), (7, "cup", 0.7)]
    for record, mask in zip(records, (masks[0], masks[2])):
        rle = mask_util.merge(mask_util.frPyObjects(record["segmentation"], 45, 61))
        assert (mask_util.decode(rle).astype(bool) == without_holes(mask)).all()
    overlap = prediction.segment_map()
    assert (overlap == np.where(masks[0], 1, np.where(masks[2], 2, 0))).all()
    with pytest.raises(ConfigError, match="masks = 'png'"):
        prediction.to_coco("png")
    image = np.full((330, 340, 3), 100, np.uint8)
    drawn = Prediction((330, 340), [Segment.from_mask(blobs((330, 340), 1), 0, 0.5)], CLASSES).draw(image)
    assert drawn.shape == image.shape and (drawn != image).mean() > 0.3


# ---- tiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, tile_size, overlap", [(50, 64, 16), (64, 64, 16), (65, 64, 16), (1000, 128, 31)])
def test_tiles_cover_the_image(length, tile_size, overlap):
    spans = tile_spans(length, tile_size, overlap)
    assert spans[0].start == spans[0].own_start == 0 and spans[-1].stop == spans[-1].own_stop == length
    for span in spans:
        assert span.stop - span.start == min(tile_size, length)
        assert span.start <= span.own_start < span.own_stop <= span.stop
    for a, b in zip(spans, spans[1:]):
        assert a.own_stop == b.own_start and a.stop - b.start >= overlap
        assert abs((a.stop - a.own_stop) - (b.own_start - b.start)) <= 1
    assert len(spans) == max(1, -(-(length - overlap) // (tile_size - overlap)))


class Oracle:
    """A predictor that returns the ground truth of each tile; ``labels``: by object id, 0 = nothing, from 100 stuff."""

    def __init__(self, ids):
        self.ids, self.sizes = ids, []

    def image(self):
        return np.stack([self.ids, np.zeros_like(self.ids), np.zeros_like(self.ids)], axis=-1).astype(np.uint8)

    def __call__(self, tile):
        self.sizes.append(tile.shape[:2])
        ids = tile[..., 0]
        found = [Segment.from_mask(ids == i, int(i >= 100), 0.5 + i / 1000) for i in np.unique(ids) if i]
        return Prediction(ids.shape, found, CLASSES)


def test_what_tiles_see_is_joined():
    ids = np.full((200, 260), 100)
    ids[:, 130:] = 0
    ids[10:30, 10:30] = 1  # inside of one tile
    ids[50:80, 40:120] = 2  # across a border
    ids[90:190, 20:240] = 3  # larger than a tile
    ids[100:120, 60:70] = 4  # on top of it, in a shared strip
    ids[20:40, 140:150] = 5  # two of a class, neighbours
    ids[20:40, 150:160] = 6
    ids[60:64, 60:64] = 101  # a hole of another stuff region
    oracle = Oracle(ids)
    prediction = predict_tiles(oracle, oracle.image(), 96, 32)
    assert len(oracle.sizes) == 3 * 4 and set(oracle.sizes) == {(96, 96)}
    # All stuff of one class is one segment
    expected = [ids >= 100, *(ids == i for i in (6, 5, 4, 3, 2, 1))]
    assert [x.area for x in prediction.segments] == [mask.sum() for mask in expected]
    assert (prediction.masks() == np.stack(expected)).all()
    assert [x.score for x in prediction.segments[1:]] == [0.506, 0.505, 0.504, 0.503, 0.502, 0.501]


def test_objects_that_tiles_see_differently_stay_apart():
    """The left tile calls the object a cup, the right one a table: each keeps its own pixels."""
    ids = np.zeros((64, 100), int)
    ids[20:40, 30:70] = 1

    def predict(tile):
        mask = tile[..., 0] > 0
        label = int(mask[:, -1].any())  # cut at the right: this is the left tile
        return Prediction(mask.shape, [Segment.from_mask(mask, label, 0.5)], CLASSES._replace(num_things=2))

    prediction = predict_tiles(predict, Oracle(ids).image(), 64, 28)
    assert sorted((x.label, x.box) for x in prediction.segments) == [(0, (50, 20, 20, 20)), (1, (30, 20, 20, 20))]


def test_a_small_image_is_one_tile(described):
    _, save = described
    predictor = knet_d2.load(save("m.pth"), device="cpu", confidence_threshold=0.0)
    image = random_image((64, 80))
    plain, tiled = predictor(image, "BGR"), predictor(image, "BGR", tile_size=80)
    assert (plain.masks() == tiled.masks()).all() and plain.to_coco() == tiled.to_coco()
    large = predictor(np.tile(image, (2, 2, 1)), "BGR", tile_size=64)
    assert large.size == (128, 160) and (large.masks().sum(axis=0) <= 1).all() and len(large.segments) > 1
    with pytest.raises(ConfigError, match="tile_overlap = 64.*1 to 63"):
        predictor(image, "BGR", tile_size=64, tile_overlap=64)


def test_a_video_from_a_file_and_from_arrays(described, tmp_path):
    """Frames of a file or a generator, in either order of channels: the same predictions, with ids that stay."""
    _, save = described
    options = ["MODEL.KNET.VIDEO.TEMPERATURE", "1e-5", "MODEL.KNET.VIDEO.NEW_TRACK_SCORE", "0.0"]
    options += ["MODEL.KNET.VIDEO.MIN_SCORE", "0.0", "MODEL.KNET.TEST.OVERLAP_THRESHOLD", "0.0"]
    predictor = knet_d2.load(save("m.pth"), device="cpu", confidence_threshold=0.0, opts=options)
    writer = cv2.VideoWriter(str(tmp_path / "in.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (84, 60))
    for _ in range(3):
        writer.write(random_image((60, 84)))
    writer.release()
    frames = [frame.image for frame in Video(str(tmp_path / "in.avi"))]
    assert len(frames) == 3
    found = list(predictor.video(str(tmp_path / "in.avi")))
    ids = [[(x.label, x.track_id) for x in prediction.segments] for prediction in found]
    assert ids[0] == ids[1] == ids[2] and len({i for _, i in ids[0]}) == len(ids[0]) > 1
    for arrays, order in ((frames, "RGB"), ((frame[:, :, ::-1] for frame in frames), "BGR")):
        again = list(predictor.video(arrays, order))
        assert [[x.track_id for x in p.segments] for p in again] == [[i for _, i in x] for x in ids]
        assert all((a.masks() == b.masks()).all() for a, b in zip(found, again, strict=True))
    still = predictor(frames[0], "RGB")
    assert {x.track_id for x in still.segments} == {None}
    with pytest.raises(DataError, match="order = None"):
        next(predictor.video(frames))
    with pytest.raises(DataError, match="absent.mp4"):
        next(predictor.video(tmp_path / "absent.mp4"))
    with pytest.raises(DataError, match="order = 'BGR' is for arrays"):
        next(predictor.video(str(tmp_path / "in.avi"), "BGR"))
