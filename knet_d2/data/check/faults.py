"""The kinds of faults that a data set can have, with their level and advice on what to do."""

from typing import NamedTuple

from ..coco_mending import MISSING_IMAGE

ERROR, WARNING = "error", "warning"


def counted(number: int, noun: str) -> str:
    """A number with a noun, for example "1 error" and "2 errors"."""
    return f"{number} {noun}{'s' * (number != 1)}"


class Kind(NamedTuple):
    """A kind of fault.

    Attributes:
        level: "error" if training or evaluation would fail or be wrong, "warning" if a person should look at it.
        advice: what to do.
    """

    level: str
    advice: str


_RLE = (
    'RLE is {"size": [height, width], "counts": ...}: the size is the size of the image, and the counts add up to '
    "height times width. Export the annotations again."
)
_LABELS = "A label map is a PNG with one channel (or a palette) that holds one class id per pixel."
_REPLACE = "Replace the file, or remove it from the data set."

KINDS: dict[str, Kind] = {
    # images
    "missing image": Kind(ERROR, MISSING_IMAGE),
    "unreadable image": Kind(ERROR, _REPLACE),
    "image size": Kind(
        ERROR,
        "height and width must be the size of the image after the rotation that its EXIF tag names. Correct them; if "
        "the image file was resized or rotated after it was annotated, restore the original file.",
    ),
    "image rotated by EXIF": Kind(
        WARNING,
        "The image is rotated by its EXIF tag, and its size does not tell whether the annotations are rotated, too. "
        "Look at the drawn ground truth; if the annotations are not rotated, remove the tag.",
    ),
    "dark image": Kind(
        WARNING,
        "Where all images are so, state their lowest and highest value in INPUT.VALUE_RANGE, as [0, 4095] for 12 bits "
        "in files of 16.",
    ),
    "same picture": Kind(WARNING, "Remove one of the two files, or replace it if it should be another picture."),
    "training image in validation": Kind(
        ERROR, "The metrics would be too high: remove the image from one of the sets."
    ),
    # any files
    "missing file": Kind(ERROR, "Add the file, or correct the path in DATASETS.CUSTOM or DETECTRON2_DATASETS."),
    "missing folder": Kind(ERROR, "Add the folder, or correct the path in DATASETS.CUSTOM or DETECTRON2_DATASETS."),
    "broken JSON": Kind(ERROR, "The file may be cut off, or of another format: export or download it again."),
    "read as meant": Kind(
        WARNING,
        "Training reads these values in the same way. knet check --fix OUT.json writes them in COCO's "
        "format, for other programs.",
    ),
    "missing key": Kind(ERROR, "Training or evaluation reads this key: export the annotations again, or add the key."),
    "wrong type": Kind(ERROR, "Correct the value, or export the annotations again; then run the check again."),
    "unusable annotation": Kind(ERROR, "Correct or remove it; knet docs DATASETS describes the format."),
    "unusable": Kind(ERROR, "Do as the message says."),
    # COCO JSON
    "no annotations": Kind(ERROR, "Nothing can be learned or evaluated here: check the export, and what is ignored."),
    "image id twice": Kind(ERROR, "Only the last of these images would be read: give each image a different id."),
    "image file twice": Kind(
        ERROR, "The objects of one entry are background in the other entry: merge the two entries of the image."
    ),
    "image without annotation": Kind(WARNING, "The image is not used. Annotate it, or remove it from the JSON."),
    "annotation id twice": Kind(ERROR, "Give each annotation a different id."),
    "annotation id 0": Kind(
        WARNING, "K-Net renumbers annotations, but other programs read 0 as 'no match': count ids from 1."
    ),
    "category id twice": Kind(ERROR, "Two classes would become one: give each category a different id."),
    "category name twice": Kind(WARNING, "These are separate classes: give them different names, or merge them."),
    "unused class": Kind(WARNING, "The model can't learn this class: remove it, or check the export."),
    "class that is not evaluated": Kind(WARNING, "Its metrics are NaN: add an image that shows this class."),
    "unknown image": Kind(
        ERROR, "image_id must equal the id of an image in the JSON's images, and have the same type: correct it."
    ),
    "unknown category": Kind(ERROR, "Add the category to the JSON's categories, or correct the annotation."),
    "ignored annotation": Kind(ERROR, "Detectron2 refuses 'ignore': remove the key, or make it a crowd (iscrowd 1)."),
    "mostly crowds": Kind(
        ERROR,
        "A crowd (iscrowd 1) is a region of many objects, and training ignores it. Set iscrowd to 0 if an annotation "
        "is one object; some tools write 1 for every mask that is not a polygon.",
    ),
    "missing segmentation": Kind(ERROR, "Training needs a mask, not only a box: add it, or remove the annotation."),
    "bad polygon": Kind(
        ERROR,
        "segmentation is a list of polygons [[x0, y0, x1, y1, x2, y2, ...], ...], each with at least 3 points. "
        "Detectron2 drops other polygons without a message: correct or remove them.",
    ),
    "polygon outside": Kind(
        ERROR, "Coordinates are pixels of the image in the size that the JSON states: check whether it was resized."
    ),
    "polygon over the edge": Kind(
        WARNING, "The part outside the image is cut off. Check that the image was not resized."
    ),
    "relative coordinates": Kind(ERROR, "Coordinates are pixels, not fractions: multiply them by the image's size."),
    "bad RLE": Kind(ERROR, _RLE),
    "empty mask": Kind(WARNING, "The mask covers no pixel, so training ignores the annotation. Remove it."),
    "wrong bbox": Kind(
        ERROR, "bbox is [x, y, width, height] of the mask, and evaluation reads it: correct it, or export again."
    ),
    "wrong area": Kind(ERROR, "area is the number of pixels of the mask, and evaluation reads it: correct it."),
    "annotation twice": Kind(WARNING, "The model can find only one of two equal objects: remove one annotation."),
    "more instances than kernels": Kind(
        WARNING, "Each kernel finds one instance: raise MODEL.KNET.NUM_KERNELS and TEST.DETECTIONS_PER_IMAGE."
    ),
    # COCO panoptic
    "unreadable PNG": Kind(ERROR, _REPLACE),
    "PNG size": Kind(ERROR, "The PNG must have the same size as its image: export it again."),
    "PNG without colours": Kind(ERROR, "A segment id is R + 256 G + 65536 B: save the PNG in colour (RGB)."),
    "PNG with red and blue swapped": Kind(
        ERROR, "A segment id is R + 256 G + 65536 B: OpenCV's channel order is BGR, so convert to RGB before saving."
    ),
    "unknown segment": Kind(
        ERROR, "Add the segment to segments_info, or set its pixels to 0 (void). PNGs must not be resized or lossy."
    ),
    "unpainted segment": Kind(ERROR, "Remove the segment from segments_info, or draw it in the PNG."),
    "segment id twice": Kind(ERROR, "Give each segment of an image a different id."),
    "segment id 0": Kind(ERROR, "The id 0 means void: give the segment another id, or remove it."),
    "stuff in pieces": Kind(
        WARNING, "Panoptic quality expects one segment per stuff class in an image: merge these segments."
    ),
    "no stuff": Kind(ERROR, "isthing is 1 for things and 0 for stuff; for data without stuff use the task 'instance'."),
    "no things": Kind(
        ERROR, "isthing is 1 for things and 0 for stuff; for data without things use the task 'semantic'."
    ),
    # label maps
    "missing label map": Kind(ERROR, "A label map is a PNG with the name of its image: add it, or remove the image."),
    "label map without image": Kind(WARNING, "The label map is not used. Add the image, or remove the label map."),
    "unreadable label map": Kind(ERROR, _REPLACE),
    "label map size": Kind(ERROR, "The label map must have the same size as its image: export it again."),
    "label map in colour": Kind(ERROR, _LABELS),
    "value of no class": Kind(
        ERROR, "Add the class to 'classes', or the value to 'ignore' of the data set; check 'label_values', too."
    ),
    "nothing labelled": Kind(WARNING, "All pixels are ignored. Remove the image, or check 'ignore'."),
    "only one class": Kind(
        ERROR,
        "The model needs at least two classes: give the other pixels a class, too. Check label_values and ignore "
        "(255 by default).",
    ),
    "other classes": Kind(ERROR, "Training and validation must have the same classes in the same order."),
}


class Fault(NamedTuple):
    """One fault of a data set.

    Attributes:
        kind: key of KINDS.
        file: path of the file.
        where: place in the file, for example "annotation 7"; "" for the whole file.
        what: what is wrong there, as the rest of a sentence whose subject is the place.
    """

    kind: str
    file: str
    where: str
    what: str

    @property
    def level(self) -> str:
        return KINDS[self.kind].level

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.where, self.what) if part)
