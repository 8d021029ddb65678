"""Data sets, mapper and loaders. Importing this package registers the generated data set."""

import os

from .build import build_loss_loader, build_test_loader, build_train_loader, load_dataset, loaded_metadata
from .categories import CategoryTable, category_table, resolve_classes
from .custom import register_custom_datasets
from .mapper import KNetDatasetMapper, build_mapper
from .shapes import register_shapes

__all__ = [
    "CategoryTable",
    "KNetDatasetMapper",
    "build_loss_loader",
    "build_mapper",
    "build_test_loader",
    "build_train_loader",
    "category_table",
    "load_dataset",
    "loaded_metadata",
    "register_custom_datasets",
    "register_shapes",
    "resolve_classes",
]

register_shapes(os.getenv("DETECTRON2_DATASETS", "datasets"))
