"""Likelihood-ratio attack on unlearning; the metric is in `u_lira.py`."""
