"""Distance of weights; the metric is in `parameter_distance.py`."""
