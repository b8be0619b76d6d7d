"""Benchmarks: unlearning measured against retraining, with seconds and memory. Start: `python -m benchmarks.run`."""
