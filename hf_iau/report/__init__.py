"""What a request did, for machines (JSON), for people (Markdown, tables) and for the eye (histograms)."""

from hf_iau.measure.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES
from hf_iau.phases import PhaseTimer
from hf_iau.report.report import UnlearningReport, installed_versions

__all__ = ["MINIMUM_ROWS_FOR_PER_ROW_FIGURES", "PhaseTimer", "UnlearningReport", "installed_versions"]
