"""The report of a run: one HTML page with the answer, the evidence and the costs; a card for every checkpoint."""

from lmq.report.data import ModelReport, PairedDifference, ReportData, StageTiming
from lmq.report.page import build_report
from lmq.report.sections.card import model_card
from lmq.report.sections.downloads import embedded_files
from lmq.report.sections.pictures import report_pictures

__all__ = [
    "ModelReport",
    "PairedDifference",
    "ReportData",
    "StageTiming",
    "build_report",
    "embedded_files",
    "model_card",
    "report_pictures",
]
