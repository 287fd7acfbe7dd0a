"""The report of a run: one HTML page with the answer, the evidence and the costs."""

from lmq.report.data import ModelReport, PairedDifference, ReportData, StageTiming
from lmq.report.page import build_report

__all__ = ["ModelReport", "PairedDifference", "ReportData", "StageTiming", "build_report"]
