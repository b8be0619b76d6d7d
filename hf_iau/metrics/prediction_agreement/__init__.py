"""Agreement of predictions; the metric is in `prediction_agreement.py`."""
