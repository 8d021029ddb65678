"""Data sets, mapper and loaders. Importing this package registers the generated data set."""

import os

from .build import build_loss_loader, build_test_loader, build_train_loader
from .classes import ClassTable, resolve_classes, with_classes
from .custom import register_custom_datasets
from .ground_truth import compact_example
from .mapper import KNetDatasetMapper, build_mapper
from .records import load_dataset
from .shapes import register_shapes

__all__ = [
    "ClassTable",
    "KNetDatasetMapper",
    "build_loss_loader",
    "build_mapper",
    "build_test_loader",
    "build_train_loader",
    "compact_example",
    "load_dataset",
    "register_custom_datasets",
    "register_shapes",
    "resolve_classes",
    "with_classes",
]

register_shapes(os.getenv("DETECTRON2_DATASETS", "datasets"))
