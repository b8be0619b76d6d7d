"""KL divergence of margins; the metric is in `klom.py`."""
