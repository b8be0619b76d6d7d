"""Deletion requests in production: many of them, one after the other, none lost, and a record of each."""

from hf_iau.requests.budget import FEWEST_ROWS, Budget
from hf_iau.requests.certificate import certificate
from hf_iau.requests.ledger import Ledger, LedgerEntry, LedgerHead
from hf_iau.requests.queue import RequestQueue
from hf_iau.requests.service import RequestService

__all__ = [
    "FEWEST_ROWS",
    "Budget",
    "Ledger",
    "LedgerEntry",
    "LedgerHead",
    "RequestQueue",
    "RequestService",
    "certificate",
]
