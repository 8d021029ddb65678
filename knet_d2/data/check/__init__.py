"""Checks of data sets before training: counts by class and size, and everything that is wrong."""

from .dataset import check_datasets
from .faults import KINDS, Fault
from .report import DatasetReport, Report

__all__ = ["KINDS", "DatasetReport", "Fault", "Report", "check_datasets"]
