"""What a request did, for machines (JSON), for people (Markdown, tables) and for the eye (histograms)."""

from hf_iau.report.report import UnlearningReport, installed_versions

__all__ = ["UnlearningReport", "installed_versions"]
