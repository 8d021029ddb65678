"""Checks data sets before training: finds faults in their files, and counts objects by class and size."""

from .dataset import check_datasets
from .faults import KINDS, Fault
from .report import DatasetReport, Report

__all__ = ["KINDS", "DatasetReport", "Fault", "Report", "check_datasets"]
