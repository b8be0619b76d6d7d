"""What a request did, for machines (JSON) and for people (an HTML page, Markdown, tables, histograms)."""

from hf_iau.report.report import UnlearningReport, installed_versions

__all__ = ["UnlearningReport", "installed_versions"]
