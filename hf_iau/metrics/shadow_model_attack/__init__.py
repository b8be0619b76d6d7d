"""Shadow-model attack; the metric is in `shadow_model_attack.py`."""
