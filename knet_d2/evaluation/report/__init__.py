"""The report of an evaluation, OUTPUT_DIR/report.html; :func:`write_report` writes it."""

from .section import Section
from .writing import REPORT, write_report

__all__ = ["REPORT", "Section", "write_report"]
