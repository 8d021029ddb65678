"""What can be wrong with a data set: the kinds of faults, what each leads to and what to do."""

from typing import NamedTuple

ERROR, WARNING = "error", "warning"


class Kind(NamedTuple):
    """level: "error" where training or evaluation fails or is wrong; "warning" where a person should look."""

    level: str
    advice: str


_RLE = (
    'RLE is {"size": [height, width], "counts": ...} of the image\'s size, whose counts add up to height times width. '
    "Export the annotations again."
)
_LABELS = "A label map is a PNG with one channel (or a palette) that holds one class id per pixel."
_REPLACE = "Replace the file, or take it out of the data set."

KINDS: dict[str, Kind] = {
    # images
    "missing image": Kind(ERROR, "Put the file there, or correct file_name or the folder of images."),
    "unreadable image": Kind(ERROR, _REPLACE),
    "image size": Kind(
        ERROR,
        "height and width must be those of the image after it was turned as its EXIF tag says. Correct them; where the "
        "image itself was resized or turned after it was annotated, restore it.",
    ),
    "image turned by EXIF": Kind(
        WARNING,
        "The image is turned by its EXIF tag, and sizes don't tell whether its annotations were. Look at the drawn "
        "ground truth; where they were not, remove the tag.",
    ),
    "16-bit image": Kind(
        ERROR, "Detectron2 reads values above 255 as white. Convert the image to 8 bits, scaled to what it holds."
    ),
    "same picture": Kind(WARNING, "Remove one of them, or correct the annotations if it should be another picture."),
    "training image in validation": Kind(ERROR, "Results would be too good: remove the image from one of the sets."),
    # any files
    "missing file": Kind(ERROR, "Put it there, or correct the path in DATASETS.CUSTOM or DETECTRON2_DATASETS."),
    "missing folder": Kind(ERROR, "Put it there, or correct the path in DATASETS.CUSTOM or DETECTRON2_DATASETS."),
    "broken JSON": Kind(ERROR, "It may be cut off, or of another format: export or fetch it again."),
    "missing key": Kind(ERROR, "Training or evaluation reads it: export the annotations again, or add it."),
    "wrong type": Kind(ERROR, "Correct the value, or export the annotations again; the rest is checked after that."),
    "unusable": Kind(ERROR, "Do as the message says."),
    # COCO JSON
    "no annotations": Kind(ERROR, "Nothing can be learned from it: check the export."),
    "image id twice": Kind(ERROR, "Only the last of these images would be read: give each image an id of its own."),
    "image file twice": Kind(
        ERROR, "What one entry of the image annotates is background in the other: keep one entry."
    ),
    "image without annotation": Kind(WARNING, "The image is not read. Annotate it, or remove it from the JSON."),
    "annotation id twice": Kind(ERROR, "Give each annotation an id of its own."),
    "annotation id 0": Kind(
        WARNING, "K-Net numbers annotations anew, but other programs take 0 for 'no match': count ids from 1."
    ),
    "category id twice": Kind(ERROR, "Two classes would become one: give each category an id of its own."),
    "category name twice": Kind(WARNING, "Both are classes of their own: give them different names, or merge them."),
    "unused class": Kind(WARNING, "The model can't learn it: remove the class, or check the export."),
    "unknown image": Kind(ERROR, "Ids of images must be the same (and of the same type) in both lists of the JSON."),
    "unknown category": Kind(ERROR, "Add the category to the JSON's categories, or correct the annotation."),
    "ignored annotation": Kind(ERROR, "Detectron2 refuses 'ignore': remove the key, or make it a crowd (iscrowd 1)."),
    "mostly crowds": Kind(
        ERROR,
        "A crowd (iscrowd 1) is a region of many objects and not learned from. Set iscrowd to 0 where an annotation is "
        "one object; some tools write 1 with every mask that is not a polygon.",
    ),
    "missing segmentation": Kind(ERROR, "A box is not enough: annotate the mask, or remove the annotation."),
    "bad polygon": Kind(
        ERROR,
        "segmentation is a list of polygons [[x0, y0, x1, y1, x2, y2, ...], ...], each of at least 3 points. "
        "Detectron2 drops others in silence: correct or remove them.",
    ),
    "polygon outside": Kind(
        ERROR, "Coordinates are pixels of the image at the size that the JSON states: check for a resized image."
    ),
    "polygon over the edge": Kind(WARNING, "What is outside is cut off. Check that the image was not resized."),
    "relative coordinates": Kind(ERROR, "Coordinates are pixels, not parts of the image: multiply by its size."),
    "bad RLE": Kind(ERROR, _RLE),
    "empty mask": Kind(WARNING, "No pixel is covered; the annotation is not learned from. Remove it."),
    "wrong bbox": Kind(
        ERROR, "bbox is [x, y, width, height] of the mask, which evaluation reads: correct it, or export again."
    ),
    "wrong area": Kind(ERROR, "Evaluation reads area, the mask's number of pixels: correct it."),
    "annotation twice": Kind(WARNING, "The same mask and class twice in an image can't both be found: remove one."),
    "more instances than kernels": Kind(
        WARNING, "A kernel finds one instance: raise MODEL.KNET.NUM_KERNELS and TEST.DETECTIONS_PER_IMAGE."
    ),
    # COCO panoptic
    "unreadable PNG": Kind(ERROR, _REPLACE),
    "PNG size": Kind(ERROR, "The PNG must have the size of its image: export it again."),
    "PNG without colours": Kind(ERROR, "A segment id is R + 256 G + 65536 B: the PNG must be saved in colour (RGB)."),
    "PNG with red and blue swapped": Kind(
        ERROR, "A segment id is R + 256 G + 65536 B: OpenCV's order of channels is BGR, convert before saving."
    ),
    "unknown segment": Kind(
        ERROR, "Add the segment to segments_info or paint it 0 (void). PNGs must not be resized or saved with loss."
    ),
    "unpainted segment": Kind(ERROR, "Remove the segment from segments_info, or paint it."),
    "segment id twice": Kind(ERROR, "Give each segment of an image an id of its own."),
    "segment id 0": Kind(ERROR, "0 is void: give the segment another id, or remove it."),
    "stuff in pieces": Kind(
        WARNING, "A stuff class is one segment in an image, and panoptic quality compares it as one: merge them."
    ),
    "no stuff": Kind(ERROR, "isthing is 1 for things and 0 for stuff; without stuff use the task 'instance'."),
    "no things": Kind(ERROR, "isthing is 1 for things and 0 for stuff; without things use the task 'semantic'."),
    # label maps
    "missing label map": Kind(ERROR, "Label maps are PNGs with the name of their image."),
    "label map without image": Kind(WARNING, "It is not read. Add the image, or remove the label map."),
    "unreadable label map": Kind(ERROR, _REPLACE),
    "label map size": Kind(ERROR, "The label map must have the size of its image: export it again."),
    "label map in colour": Kind(ERROR, _LABELS),
    "value of no class": Kind(
        ERROR, "Name the class, or list the value in 'ignore' of the data set (see label_values, too)."
    ),
    "nothing labelled": Kind(WARNING, "All pixels are ignored. Remove the image, or check 'ignore'."),
    "only one class": Kind(
        ERROR,
        "There is nothing to tell apart: give the rest a class, too. Check label_values and ignore (255 by default).",
    ),
    "other classes": Kind(ERROR, "Training and validation must have the same classes in the same order."),
}


class Fault(NamedTuple):
    """One thing that is wrong.

    Attributes:
        kind: a key of KINDS.
        file: path of the file.
        where: the place in it, as "annotation 7"; "" for all of it.
        what: what is wrong, in words.
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
