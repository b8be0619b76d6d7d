"""Gap to a retrained model; the metric is in `unlearning_gap.py`."""
