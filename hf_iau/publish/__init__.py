"""After the request: what still remembers the rows, and what may be published of them."""

from hf_iau.publish.artefacts import AuditReport, Finding, audit
from hf_iau.publish.card import ServedRequest, UnlearningCard

__all__ = ["AuditReport", "Finding", "ServedRequest", "UnlearningCard", "audit"]
