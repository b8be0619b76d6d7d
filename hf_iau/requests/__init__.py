"""Deletion requests in production: many of them, one after the other, none lost, and a record of each."""

from hf_iau.requests.ledger import Ledger, LedgerEntry, LedgerHead

__all__ = ["Ledger", "LedgerEntry", "LedgerHead"]
