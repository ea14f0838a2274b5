"""What people look at: tables, figures, a summary in sentences, one HTML page, and the tables of the paper.

This room is above `hsat.eval`, which knows nothing of it.
"""

from __future__ import annotations

from hsat.report.accuracy_plot import plot_accuracy_vs_eps
from hsat.report.artifacts import Artifacts, ConditionArrays, read_artifacts
from hsat.report.fraction_plot import plot_accuracy_vs_fraction
from hsat.report.page import write_report
from hsat.report.paper import PaperRow, PaperTable, paper_csv, paper_latex, paper_lines, paper_markdown
from hsat.report.plots import plot_certified_accuracy, plot_patches, plot_transfer
from hsat.report.record_files import record_tables, records_csv, records_frame, records_latex
from hsat.report.run_folders import RunFolder, open_runs
from hsat.report.short_summary import short_summary
from hsat.report.tables import accuracy_tables, differences_table, markdown_table, transfer_markdown, transfer_tables
from hsat.report.views_plot import plot_views

__all__ = [
    "Artifacts",
    "ConditionArrays",
    "PaperRow",
    "PaperTable",
    "RunFolder",
    "accuracy_tables",
    "differences_table",
    "markdown_table",
    "open_runs",
    "paper_csv",
    "paper_latex",
    "paper_lines",
    "paper_markdown",
    "plot_accuracy_vs_eps",
    "plot_accuracy_vs_fraction",
    "plot_certified_accuracy",
    "plot_patches",
    "plot_transfer",
    "plot_views",
    "read_artifacts",
    "record_tables",
    "records_csv",
    "records_frame",
    "records_latex",
    "short_summary",
    "transfer_markdown",
    "transfer_tables",
    "write_report",
]
