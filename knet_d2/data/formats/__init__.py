"""Readers of annotations in the formats of label tools; each gives the content of a COCO instances JSON.

A reader is one small function; classes, ids, sizes, boxes and areas are filled in for all of them in the same way.
"""

from .builder import class_names
from .masks import read_labelmap
from .reading import READERS, Annotations, Reader, read_annotations

__all__ = ["READERS", "Annotations", "Reader", "class_names", "read_annotations", "read_labelmap"]
