"""TOFU's forget quality and model utility; the metric is in `tofu.py`."""
