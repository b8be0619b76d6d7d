"""Membership inference; the metric is in `membership_inference.py`."""
