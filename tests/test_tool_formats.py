"""Annotations of label tools: each reader gives the same scene, and ground truth as predictions scores 100."""

import csv
import json
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
import tool_formats
from data_helpers import data_cfg, unique_name
from dataset_trees import CLASSES, NUM_IMAGES, SIZE, write_images
from PIL import Image
from pycocotools.coco import COCO
from test_oracle import assert_perfect, scores
from tool_formats import NAMES, TOOLS, write_tool

from knet_d2.data import load_dataset
from knet_d2.data.check import check_datasets
from knet_d2.data.custom import FORMATS
from knet_d2.data.formats import READERS, class_names
from knet_d2.data.formats.masks import voc_color
from knet_d2.errors import ConfigError, DataError
from knet_d2.programs import convert_dataset


def _decode(segmentation):
    if isinstance(segmentation, list):
        return mask_util.decode(mask_util.merge(mask_util.frPyObjects(segmentation, *SIZE))).astype(bool)
    return mask_util.decode(segmentation).astype(bool)


def _entry(kind, root, **keys):
    write_images(root / "images")
    return {"name": unique_name(kind), "type": kind, "images": str(root / "images"), **keys}


def _records(entry):
    data_cfg("instance", custom=(entry,))
    return load_dataset(entry["name"])


def _found(records):
    """Sorted (class, mask as bytes) of each image."""
    return [sorted((x["category_id"], _decode(x["segmentation"]).tobytes()) for x in r["annotations"]) for r in records]


EXPECTED = [sorted((c, mask.tobytes()) for c, mask in tool_formats.masks(i)) for i in range(NUM_IMAGES)]


def _report(entry):
    return check_datasets(data_cfg("instance", custom=(entry,), resolve=False))


def test_every_reader_is_tested():
    assert {kind for kind, _ in TOOLS.values()} == set(READERS) and set(READERS) < set(FORMATS)


@pytest.mark.parametrize("tool", TOOLS)
def test_records_are_the_scene(tmp_path, tool):
    records = _records(write_tool(tmp_path, tool, unique_name("tool")))
    assert _found(records) == EXPECTED
    for i, record in enumerate(records):
        assert (record["height"], record["width"]) == SIZE and os.path.isfile(record["file_name"])
        boxes = sorted(x["bbox"] for x in record["annotations"])
        assert boxes == pytest.approx(np.array(sorted(list(box) for _, *box in tool_formats.objects(i)), float))


@pytest.mark.parametrize("tool", TOOLS)
def test_ground_truth_as_predictions_scores_100(tmp_path, tool):
    entry = write_tool(tmp_path, tool, unique_name("tool"))
    assert_perfect(scores("instance", entry["name"], (entry,)), "bbox", "segm")


@pytest.mark.parametrize("tool", TOOLS)
def test_check_counts_objects(tmp_path, tool):
    report = _report(write_tool(tmp_path, tool, unique_name("tool")))
    assert report.faults == []
    assert [(x["class"], x["instances"]) for x in report.datasets[0].table] == [("car", 4), ("person", 2)]


@pytest.mark.parametrize("tool", TOOLS)
def test_converter_writes_coco(tmp_path, tool, capsys):
    entry = write_tool(tmp_path, tool, "data")
    output = str(tmp_path / "coco.json")
    keys = [f"{key}={json.dumps(value)}" for key, value in entry.items() if key not in ("name", "type")]
    convert_dataset.main(convert_dataset.get_parser().parse_args([entry["type"], output, *keys]))
    assert "2 images, 6 annotations, 2 categories" in capsys.readouterr().out
    truth = COCO(output)
    assert [x["name"] for x in truth.loadCats([1, 2])] == NAMES
    found = [sorted((x["category_id"] - 1, truth.annToMask(x).astype(bool).tobytes()) for x in truth.imgToAnns[i])
             for i in sorted(truth.imgs)]  # fmt: skip
    assert found == EXPECTED
    images = entry.get("images") or os.path.join(entry["root"], "JPEGImages")
    as_coco = {"name": unique_name("coco"), "type": "coco_instance", "json": output, "images": images}
    assert _report(as_coco).faults == []


# ---- YOLO


def _yolo(tmp_path, rows, classes=("car", "person")):
    (tmp_path / "labels").mkdir()
    for i, text in enumerate(rows):
        if text is not None:
            (tmp_path / "labels" / f"{i:06d}.txt").write_text(text)
    return _entry("yolo_seg", tmp_path, labels=str(tmp_path / "labels"), classes=list(classes))


def test_yolo_boxes_are_rectangles_and_rows_count_once(tmp_path, caplog):
    row = "1 0.5 0.5 0.25 0.5"
    entry = _yolo(tmp_path, [f"{row}\n{row}\n", None])
    first, second = _records(entry)
    (instance,) = first["annotations"]
    mask = np.zeros(SIZE, bool)
    mask[16:48, 48:80] = True
    assert np.array_equal(_decode(instance["segmentation"]), mask) and instance["category_id"] == 1
    assert second["annotations"] == []  # kept as an image without objects
    for what in ("a row is a box", "a row occurs twice", "an image has no text file"):
        assert sum(what in x.getMessage() for x in caplog.records) == 1


def test_yolo_values_beyond_the_edge_are_rounding_up_to_a_hundredth(tmp_path):
    (first, _) = _records(_yolo(tmp_path, ["0 -0.01 -0.005 1.01 0 1 1.01 0 1", ""]))
    assert _decode(first["annotations"][0]["segmentation"]).all()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("names: {1: car, 2: person}", r"names has the keys \[1, 2\], without 0"),
        ("names: {0: car, x: person}", "without 1"),
        ("nc: 3\nnames: [car, person]", "nc = 3, but names has 2 names"),
        ("names: [no, yes]", r"\[False, True\].*need quotes"),
        ("names: [car, '']", "different names"),
    ],
)
def test_class_names_that_would_number_classes_wrongly(tmp_path, text, reason):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        class_names(str(path))
    others = "".join(f", {i}: c{i}" for i in (1, *range(3, 10)))
    path.write_text(f"names: {{'0': car, '2': dog, '10': bus{others}}}")
    assert class_names(str(path))[:3] == ["car", "c1", "dog"] and class_names(str(path))[10] == "bus"
    (tmp_path / "names.txt").write_text("car\n\nperson\n")  # the second class has no name
    with pytest.raises(DataError, match="different names"):
        class_names(str(tmp_path / "names.txt"))


def test_yolo_joined_parts_and_holes(tmp_path):
    """One ring for two parts, joined by a bridge of no width; one for a square with a hole, joined by a slit."""
    parts = [(8, 8), (24, 8), (24, 16), (40, 16), (40, 8), (56, 8), (56, 24), (40, 24), (40, 16), (24, 16), (24, 24)]
    hole = [(64, 8), (104, 8), (104, 48), (64, 48), (64, 8), (74, 18), (74, 38), (94, 38), (94, 18), (74, 18)]
    rows = ["0 " + " ".join(f"{x / SIZE[1]} {y / SIZE[0]}" for x, y in ring) for ring in ([*parts, (8, 24)], hole)]
    (first, _) = _records(_yolo(tmp_path, ["\n".join(rows), ""]))
    joined, ring = (_decode(x["segmentation"]) for x in first["annotations"])
    union = np.zeros(SIZE, bool)
    union[8:24, 8:24] = union[8:24, 40:56] = True
    different = np.argwhere(joined != union)
    assert len(different) <= 16 and set(different[:, 0].tolist()) <= {15, 16}  # on the bridge alone
    assert not ring[20:36, 76:92].any() and ring[10:46, 66:72].all() and ring[10:46, 96:102].all()


def test_yolo_run_lengths(tmp_path):
    (_, mask), *_ = tool_formats.masks(0)
    counts = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    (first, _) = _records(_yolo(tmp_path, [f"1 rle {SIZE[0]} {SIZE[1]} {counts}", ""]))
    assert np.array_equal(_decode(first["annotations"][0]["segmentation"]), mask)


@pytest.mark.parametrize(
    "row, what",
    [
        ("0 0.1 0.1 0.2 0.1 0.2 1.02", "the coordinate 1.02 is not a fraction"),
        ("2 0.1 0.1 0.2 0.1 0.2 0.2", "its class 2 is not one of the 2 classes"),
        ("0.5 0.1 0.1 0.2 0.1 0.2 0.2", "its class 0.5 is not one of the 2 classes"),
        ("0 0.1 0.1 0.2 0.1 0.2", "the row has 5 numbers behind the class"),
        ("0 0.1 0.1", "the row has 2 numbers behind the class"),
        ("0 0.1 0.1 0.2 nan 0.2 0.2", "the coordinate nan"),
        ("0 a b c d e f", "could not convert"),
        (f"0 rle {SIZE[1]} {SIZE[0]} 04", "the run lengths are of"),
    ],
)
def test_a_wrong_row_of_yolo_is_named_and_the_others_are_checked(tmp_path, row, what):
    good = "1 0.1 0.1 0.5 0.1 0.5 0.5"
    entry = _yolo(tmp_path, [f"{good}\n{row}\n", good.replace("1 ", "0 ", 1)])
    report = _report(entry)
    (fault,) = report.faults
    assert (fault.kind, fault.where) == ("unusable annotation", "line 2") and what in fault.what
    assert fault.file == os.path.join(entry["labels"], "000000.txt")
    assert sum(x["instances"] for x in report.datasets[0].table) == 2
    with pytest.raises(DataError, match=r"000000.txt: line 2: .*Correct or remove it"):
        _records(entry)


# ---- VIA


def _via(tmp_path, change):
    content = tool_formats.via_images()
    change(content, next(iter(content.values())))
    (tmp_path / "via.json").write_text(json.dumps(content))
    return _entry("via", tmp_path, annotations=str(tmp_path / "via.json"))


def test_via_csv_with_a_long_row(tmp_path):
    """A polygon of more characters than Python's reader takes by default."""
    xs, ys = [20 + i % 40 for i in range(30000)], [10 + i % 30 for i in range(30000)]
    row = ["000000.jpg", json.dumps({"name": "polygon", "all_points_x": xs, "all_points_y": ys}), '{"class": "car"}']
    with open(tmp_path / "via.csv", "w", newline="") as f:
        csv.writer(f).writerows([["filename", "region_shape_attributes", "region_attributes"], row])
    record = _records(_entry("via", tmp_path, annotations=str(tmp_path / "via.csv")))[0]
    assert len(record["annotations"]) == 1


def test_via_without_attributes_has_one_class(tmp_path):
    def change(content, _):
        for image in content.values():
            for region in image["regions"]:
                region["region_attributes"] = {}

    entry = _via(tmp_path, change)
    assert _report(entry).datasets[0].table[0]["class"] == "object"


def test_via_shapes(tmp_path):
    """A circle and an ellipse that is rotated by a right angle; images without regions are kept."""

    def change(content, image):
        for other in content.values():
            other["regions"] = {}
        shapes = [
            {"name": "circle", "cx": 30, "cy": 30, "r": 20},
            {"name": "ellipse", "cx": 90, "cy": 32, "rx": 30, "ry": 12, "theta": np.pi / 2},
        ]
        image["regions"] = [{"shape_attributes": x, "region_attributes": {"kind": "car"}} for x in shapes]

    first, second = _records(_via(tmp_path, change))
    assert second["annotations"] == []
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    circle = (columns - 30) ** 2 + (rows - 30) ** 2 < 20**2
    ellipse = ((columns - 90) / 12) ** 2 + ((rows - 32) / 30) ** 2 < 1
    for annotation, expected in zip(first["annotations"], (circle, ellipse)):
        mask = _decode(annotation["segmentation"])
        assert (mask & expected).sum() / (mask | expected).sum() > 0.97


@pytest.mark.parametrize(
    "region, what",
    [
        ({"shape_attributes": {"name": "point", "cx": 3, "cy": 4}}, "the shape 'point' has no area"),
        ({"shape_attributes": {"name": "polygon", "all_points_x": [1, 2, 3]}}, "lacks 'all_points_y'"),
        ({"shape_attributes": {"name": "polygon", "all_points_x": [1], "all_points_y": [1, 2]}}, "zip()"),
        ({"region_attributes": {"kind": {"car": True, "person": True}}}, "choose one value"),
        ({"region_attributes": {}}, "the attribute 'kind', which names the class, is None"),
    ],
)
def test_a_wrong_region_of_via_is_named(tmp_path, region, what):
    report = _report(_via(tmp_path, lambda _, image: image["regions"][1].update(region)))
    (fault,) = report.faults
    assert fault.where == "000000.jpg, region 1" and what in fault.what


def test_regions_of_other_types(tmp_path):
    report = _report(_via(tmp_path, lambda _, image: image["regions"].append(7)))
    assert [(x.where, x.what) for x in report.faults] == [("000000.jpg, region 3", "has no shape")]
    with pytest.raises(DataError, match="the regions of 000000.jpg are no list"):
        _records(_via(tmp_path, lambda _, image: image.update(regions=7)))


@pytest.mark.parametrize("content", ["[]", "{}", '{"project": {}, "file": {}}', "no JSON"])
def test_what_is_no_export_of_via(tmp_path, content):
    (tmp_path / "via.json").write_text(content)
    with pytest.raises(DataError, match=r"via\.json: is not"):
        _records(_entry("via", tmp_path, annotations=str(tmp_path / "via.json")))


# ---- labelme


def test_labelme_circle_and_images_without_a_file(tmp_path, caplog):
    (tmp_path / "labelme").mkdir()
    shapes = [{"label": "car", "points": [[30, 30], [30, 50]], "shape_type": "circle"}]
    (tmp_path / "labelme" / "000001.json").write_text(json.dumps({"shapes": shapes, "imagePath": ""}))
    (record,) = _records(_entry("labelme", tmp_path, annotations=str(tmp_path / "labelme")))
    assert record["file_name"].endswith("000001.jpg") and (record["height"], record["width"]) == SIZE
    assert _decode(record["annotations"][0]["segmentation"]).sum() == pytest.approx(np.pi * 20**2, rel=0.02)
    assert "an image has no JSON file; left out (1 place" in caplog.text


def test_labelme_shapes_without_area(tmp_path):
    entry = write_tool(tmp_path, "labelme", unique_name("tool"))
    path = tmp_path / "labelme" / "000001.json"
    content = json.loads(path.read_text())
    content["shapes"].append({"label": "car", "points": [[1, 1], [5, 5]], "shape_type": "line"})
    content["shapes"].append({"label": "car", "points": [[1, "a"]], "shape_type": "polygon"})
    corners = [[1, 1], [5, 5], [1, 5]]
    content["shapes"] += [{"label": x, "points": corners, "shape_type": "polygon"} for x in (None, " ", " car ")]
    path.write_text(json.dumps(content))
    faults = _report(entry).faults
    assert [x.where for x in faults] == ["shapes[4] (car)", "shapes[5] (car)", "shapes[6] ()", "shapes[7] ()"]
    assert "the shape_type 'line' has no area" in faults[0].what
    assert "has no label" in faults[2].what and "has no label" in faults[3].what


@pytest.mark.parametrize("changes", [{"imageHeight": 10**9}, {"imageWidth": 12}, {"imageHeight": None}])
def test_labelme_masks_are_not_decoded_into_any_size(tmp_path, changes):
    entry = write_tool(tmp_path, "labelme", unique_name("tool"))
    path = tmp_path / "labelme" / "000000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    faults = [x.what for x in _report(entry).faults if x.kind == "unusable annotation"]
    assert faults == ["the mask is larger than the image" if "imageWidth" in changes else faults[0]]
    assert "imageWidth" in changes or "a mask needs imageHeight" in faults[0]


# ---- masks


def test_a_photo_does_not_number_objects(tmp_path):
    keys = tool_formats.instance_png(tmp_path)
    noise = np.random.default_rng(0).permutation(200 * 200).reshape(200, 200).astype(np.uint16)
    Image.fromarray(noise).save(tmp_path / "masks" / "000000.png")
    with pytest.raises(DataError, match=r"000000.png: has 39999 values, so it does not number objects"):
        _records(_entry("instance_png", tmp_path, **keys))


def test_instance_png_of_one_class(tmp_path):
    keys = tool_formats.instance_png(tmp_path, divisor=0)
    keys = {"masks": keys["masks"], "classes": ["cell"]}
    records = _records(_entry("instance_png", tmp_path, **keys))
    assert [len(x["annotations"]) for x in records] == [3, 3]
    assert {x["category_id"] for r in records for x in r["annotations"]} == {0}
    with pytest.raises(DataError, match="several classes need 'class_divisor'"):
        _records(_entry("instance_png", tmp_path, masks=keys["masks"], classes=NAMES))


def test_instance_png_that_is_missing_or_of_no_class(tmp_path):
    keys = tool_formats.instance_png(tmp_path)
    os.remove(tmp_path / "masks" / "000001.png")
    report = _report(_entry("instance_png", tmp_path, **{**keys, "classes": ["car"]}))
    assert [x.what for x in report.faults if x.kind == "unusable annotation"] == [
        "its class 2 is not one of the 1 classes",
        f"has no PNG {tmp_path}/masks/000001.png",
    ]


def test_one_folder_for_each_image_and_names_with_a_common_start(tmp_path):
    """As the Data Science Bowl has it: NAME/images/NAME.png and NAME/masks/*.png."""
    for i in range(2):
        write_images(tmp_path / "all")
        folder = tmp_path / "data" / f"cell{i}"
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        Image.open(tmp_path / "all" / f"{i:06d}.jpg").save(folder / "images" / f"cell{i}.png")
        for number, (_, mask) in enumerate(tool_formats.masks(i)[: 1 + i]):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{number}.png")
    root = str(tmp_path / "data")
    records = _records({"name": unique_name("dsb"), "type": "png_per_instance", "images": root, "masks": root})
    assert [len(x["annotations"]) for x in records] == [1, 2]
    flat = tmp_path / "flat"
    for folder in ("images", "masks"):
        (flat / folder).mkdir(parents=True)
    for name, owned in (("a", ["a_1"]), ("a_b", ["a_b_1", "a_b_2"])):
        Image.new("RGB", SIZE[::-1]).save(flat / "images" / f"{name}.png")
        for mask in owned:
            Image.fromarray(tool_formats.masks(0)[0][1].astype(np.uint8)).save(flat / "masks" / f"{mask}.png")
    keys = {"images": str(flat / "images"), "masks": str(flat / "masks")}
    records = _records({"name": unique_name("flat"), "type": "png_per_instance", **keys})
    assert [len(x["annotations"]) for x in records] == [1, 2]
    os.rename(flat / "masks" / "a_1.png", flat / "masks" / "c_1.png")
    with pytest.raises(DataError, match="c_1.png: is the mask of no image"):
        _records({"name": unique_name("flat"), "type": "png_per_instance", **keys})


def test_list_of_images_of_pascal_voc(tmp_path):
    entry = write_tool(tmp_path, "Pascal VOC", unique_name("tool"))
    (tmp_path / "val.txt").write_text("000001\n")
    (record,) = _records({**entry, "list": str(tmp_path / "val.txt")})
    assert record["file_name"].endswith("000001.jpg")


def test_colours_of_pascal_voc():
    """The first colours of the development kit, and that of the border, the class 255."""
    found = [voc_color(i) for i in (0, 1, 2, 3, 4, 8, 20, 255)]
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (64, 0, 0), (0, 64, 128)]
    assert found == [*expected, (224, 224, 192)]


# ---- semantic label maps in colour

COLORS, VOID = [[250, 50, 83], [51, 221, 255], [0, 0, 10], [0, 10, 0]], [9, 9, 9]


def _colored(tmp_path, **changes):
    labels = tool_formats.write_color_labels(tmp_path, COLORS, VOID)
    entry = _entry("sem_seg", tmp_path, labels=labels, classes=list(CLASSES), colors=COLORS, ignore_colors=[VOID])
    return {key: value for key, value in {**entry, **changes}.items() if value is not None}


def _check_semantic(entry):
    return check_datasets(data_cfg("semantic", custom=(entry,), resolve=False))


def test_label_maps_in_colour(tmp_path):
    entry = _colored(tmp_path)
    assert _check_semantic(entry).faults == []
    assert_perfect(scores("semantic", entry["name"], (entry,)), "sem_seg")
    rows = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(["other", *CLASSES], [VOID, *COLORS])]
    (tmp_path / "labelmap.txt").write_text("# comment\n" + "\n".join(rows))
    table = str(tmp_path / "labelmap.txt")
    again = {**entry, "name": unique_name("colors"), "colors": table}
    del again["ignore_colors"]
    assert_perfect(scores("semantic", again["name"], (again,)), "sem_seg")


def test_a_colour_without_a_class_is_named(tmp_path):
    entry = _colored(tmp_path, ignore_colors=None)
    faults = _check_semantic(entry).faults
    assert [x.kind for x in faults] == ["value of no class"] * 2
    assert f"has the colour (9, 9, 9) in {6 * SIZE[0]} pixels" in faults[0].what


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"colors": COLORS[:2]}, "colors has 2 entries: use one for each of 4 classes"),
        ({"colors": [*COLORS[:3], [0, 0, 300]]}, r"the colour \[0, 0, 300\] is not"),
        ({"colors": [*COLORS[:3], COLORS[0]]}, "only once"),
        ({"ignore_colors": [COLORS[0]]}, "only once"),
        ({"colors": None}, "ignore_colors is for label maps in colour"),
        ({"ignore": [3]}, "colors replace label_values and ignore"),
    ],
)
def test_wrong_colours_are_config_errors(tmp_path, changes, what):
    with pytest.raises(ConfigError, match=what):
        _check_semantic(_colored(tmp_path, **changes))
