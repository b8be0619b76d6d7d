"""Fixtures of these tests."""

from predictions_from_numbers import rows

__all__ = ["rows"]
