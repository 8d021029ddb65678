"""The documented path of :mod:`knet_d2.data.classes`."""

from .data.classes import ClassTable, categories, class_table, from_categories

__all__ = ["ClassTable", "categories", "class_table", "from_categories"]
