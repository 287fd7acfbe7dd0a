"""The report of a run: one HTML page with the answer, the evidence and the costs."""

from lmq.report.data import ModelReport, PairedDifference, ReportData, StageTiming
from lmq.report.page import build_report
from lmq.report.pictures import report_pictures

__all__ = ["ModelReport", "PairedDifference", "ReportData", "StageTiming", "build_report", "report_pictures"]
