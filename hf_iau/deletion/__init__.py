"""Deletion requests in production: many of them, one after the other, none lost, and a record of each."""

from hf_iau.deletion.artefacts import AuditReport, audit
from hf_iau.deletion.ledger import Ledger, LedgerEntry, LedgerHead
from hf_iau.deletion.queue import RequestQueue
from hf_iau.deletion.service import DeletionOutput, DeletionService

__all__ = [
    "AuditReport",
    "DeletionOutput",
    "DeletionService",
    "Ledger",
    "LedgerEntry",
    "LedgerHead",
    "RequestQueue",
    "audit",
]
