"""Writes the scene of dataset_trees (without its crowd) as label tools do: each function returns the keys of an entry.

Classes are car and person; an image has two cars and a person.
"""

import base64
import csv
import io
import json
import os

import numpy as np
from dataset_trees import CLASSES, NUM_IMAGES, NUM_THINGS, SIZE, class_map, rectangles, write_images
from PIL import Image

NAMES = list(CLASSES[:NUM_THINGS])
VOC_COLORS = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]


def objects(image):
    """The objects of an image: (class, x, y, width, height)."""
    return [(c, x, y, w, h) for c, x, y, w, h, crowd in rectangles(image) if not crowd]


def masks(image):
    """(class, mask) of the objects of an image."""
    found = []
    for c, x, y, w, h in objects(image):
        mask = np.zeros(SIZE, bool)
        mask[y : y + h, x : x + w] = True
        found.append((c, mask))
    return found


def corners(x, y, w, h):
    return [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]


def stem(image):
    return f"{image:06d}"


def yolo_seg(root):
    (root / "labels").mkdir()
    for i in range(NUM_IMAGES):
        rows = [
            f"{c} " + " ".join(f"{px / SIZE[1]:.8f} {py / SIZE[0]:.8f}" for px, py in corners(*box))
            for c, *box in objects(i)
        ]
        (root / "labels" / f"{stem(i)}.txt").write_text("\n".join(rows) + "\n")
    (root / "data.yaml").write_text(f"train: images\nnc: 2\nnames: {NAMES}\n")
    return {"labels": str(root / "labels"), "classes": str(root / "data.yaml")}


def via_images(polygon=True):
    """{key: image} of VIA 2, with regions in a list."""
    content = {}
    for i in range(NUM_IMAGES):
        regions = []
        for c, x, y, w, h in objects(i):
            shape = {"name": "rect", "x": x, "y": y, "width": w, "height": h}
            if polygon:
                xs, ys = zip(*corners(x, y, w, h))
                shape = {"name": "polygon", "all_points_x": list(xs), "all_points_y": list(ys)}
            regions.append({"shape_attributes": shape, "region_attributes": {"kind": NAMES[c]}})
        name = f"{stem(i)}.jpg"
        content[f"{name}{1000 + i}"] = {"filename": name, "size": 1000 + i, "regions": regions, "file_attributes": {}}
    return content


def via(root):
    (root / "via.json").write_text(json.dumps(via_images()))
    return {"annotations": str(root / "via.json")}


def via_1(root):
    """Regions in a dict."""
    content = via_images()
    for image in content.values():
        image["regions"] = {str(i): region for i, region in enumerate(image["regions"])}
    (root / "via.json").write_text(json.dumps(content))
    return {"annotations": str(root / "via.json")}


def via_project(root):
    """A saved project; the class is the chosen option of a check box, beside another attribute."""
    content = via_images(polygon=False)
    for image in content.values():
        for region in image["regions"]:
            region["region_attributes"]["kind"] = {region["region_attributes"]["kind"]: True, "other": False}
            region["region_attributes"]["colour"] = "red"
    (root / "via.json").write_text(json.dumps({"_via_settings": {}, "_via_img_metadata": content}))
    return {"annotations": str(root / "via.json"), "attribute": "kind"}


def via_csv(root):
    with open(root / "via.csv", "w", newline="", encoding="utf-8-sig") as f:
        rows = csv.writer(f)
        names = ["file_attributes", "region_count", "region_id", "region_shape_attributes", "region_attributes"]
        rows.writerow(["#filename", "file_size", *names])
        for image in via_images().values():
            for i, region in enumerate(image["regions"]):
                values = [json.dumps(region[key]) for key in ("shape_attributes", "region_attributes")]
                rows.writerow([image["filename"], image["size"], "{}", len(image["regions"]), i, *values])
    return {"annotations": str(root / "via.csv")}


def _shape(label, points, kind="polygon", group=None):
    return {"label": label, "points": points, "shape_type": kind, "group_id": group, "flags": {}}


def labelme(root):
    """A polygon in two parts of one group, a rectangle, and a mask."""
    (root / "labelme").mkdir()
    for i in range(NUM_IMAGES):
        (a, *first), (b, *second), (c, x, y, w, h) = objects(i)
        fx, fy, fw, fh = first
        halves = [corners(fx, fy, fw // 2, fh), corners(fx + fw // 2, fy, fw - fw // 2, fh)]
        shapes = [_shape(NAMES[a], [list(p) for p in half], group=1) for half in halves]
        shapes.append(_shape(NAMES[b], [list(corners(*second)[2]), list(corners(*second)[0])], "rectangle"))
        png = io.BytesIO()
        Image.fromarray(np.full((h, w), 255, np.uint8)).save(png, "PNG")
        mask = _shape(NAMES[c], [[x, y], [x + w - 1, y + h - 1]], "mask")
        shapes.append({**mask, "mask": base64.b64encode(png.getvalue()).decode()})
        content = {"version": "5.5.0", "shapes": shapes, "imagePath": f"..\\images\\{stem(i)}.jpg", "imageData": None}
        content.update(imageHeight=SIZE[0], imageWidth=SIZE[1])
        (root / "labelme" / f"{stem(i)}.json").write_text(json.dumps(content))
    return {"annotations": str(root / "labelme")}


def instance_png(root, divisor=1000):
    """16 bits: 1000 times the class plus the number of the object."""
    (root / "masks").mkdir()
    for i in range(NUM_IMAGES):
        values = np.zeros(SIZE, np.uint16)
        for number, (c, mask) in enumerate(masks(i), 1):
            values[mask] = divisor * (c + 1) + number
        Image.fromarray(values).save(root / "masks" / f"{stem(i)}.png")
    return {"masks": str(root / "masks"), "classes": NAMES, "class_divisor": divisor}


def png_per_instance(root):
    """masks/IMAGE/CLASS/NUMBER.png, with the values 0 and 255."""
    for i in range(NUM_IMAGES):
        for number, (c, mask) in enumerate(masks(i)):
            folder = root / "masks" / stem(i) / NAMES[c]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{number}.png")
    return {"masks": str(root / "masks")}


def _voc(root, kind_colors, as_palette):
    """JPEGImages, SegmentationClass, SegmentationObject; a border of void pixels is outside of the objects."""
    os.rename(root / "images", root / "JPEGImages")
    for folder in ("SegmentationClass", "SegmentationObject"):
        (root / folder).mkdir()
    for i in range(NUM_IMAGES):
        numbers, kinds = np.zeros((2, *SIZE), np.uint8)
        numbers[:, -1] = kinds[:, -1] = 255
        for number, (c, mask) in enumerate(masks(i), 1):
            numbers[mask], kinds[mask] = number, c + 1
        for folder, values, colors in (("Object", numbers, VOC_COLORS), ("Class", kinds, kind_colors)):
            table = np.zeros((256, 3), np.uint8)
            table[: len(colors)], table[255] = colors, (224, 224, 192)
            picture = Image.fromarray(values) if as_palette else Image.fromarray(table[values])
            if as_palette:
                picture.putpalette(table.tobytes())
            picture.save(root / f"Segmentation{folder}" / f"{stem(i)}.png")


def voc(root):
    _voc(root, VOC_COLORS, as_palette=True)
    return {"root": str(root), "images": None, "classes": NAMES}


def cvat_masks(root):
    """CVAT's "Segmentation mask 1.1": colours of its own in labelmap.txt."""
    colors = [(0, 0, 0), (250, 50, 83), (51, 221, 255)]
    _voc(root, colors, as_palette=False)
    rows = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(["background", *NAMES], colors)]
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "\n".join(rows) + "\n")
    return {"root": str(root), "images": None}


# Name of the test -> (type in DATASETS.CUSTOM, writer)
TOOLS = {
    "YOLO": ("yolo_seg", yolo_seg),
    "VIA 2": ("via", via),
    "VIA 1": ("via", via_1),
    "VIA project": ("via", via_project),
    "VIA CSV": ("via", via_csv),
    "labelme": ("labelme", labelme),
    "instance PNG": ("instance_png", instance_png),
    "PNG per instance": ("png_per_instance", png_per_instance),
    "Pascal VOC": ("voc", voc),
    "CVAT masks": ("voc", cvat_masks),
}


def write_tool(root, tool, name):
    """Write the scene below root as a tool does; returns the entry of DATASETS.CUSTOM."""
    root.mkdir(exist_ok=True)
    write_images(root / "images")
    kind, write = TOOLS[tool]
    entry = {"name": name, "type": kind, "images": str(root / "images"), **write(root)}
    return {key: value for key, value in entry.items() if value is not None}


def write_color_labels(root, colors, void):
    """Semantic label maps in colour: one colour for each of CLASSES, and one for void; returns their folder."""
    (root / "colors").mkdir()
    for i in range(NUM_IMAGES):
        table = np.array([*colors, void], np.uint8)
        Image.fromarray(table[class_map(i).clip(max=len(colors))]).save(root / "colors" / f"{stem(i)}.png")
    return str(root / "colors")
