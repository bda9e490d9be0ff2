"""Benchmarks of focalkern against what else computes the same loss; start with `throughput.py`."""
