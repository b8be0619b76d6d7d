"""Relearn time; the metric is in `relearn_time.py`."""
