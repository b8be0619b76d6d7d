"""Benchmarks: unlearning measured against retraining, with seconds and memory. Start with `python -m benchmarks.run`."""
