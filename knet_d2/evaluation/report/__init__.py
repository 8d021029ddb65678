"""The report of an evaluation, OUTPUT_DIR/report.html; :func:`write_report` writes it."""

from .section import Section
from .writing import REPORT, recommended_threshold, report_name, write_report

__all__ = ["REPORT", "Section", "recommended_threshold", "report_name", "write_report"]
