"""Servers that fail in every way while a client decodes: `python -m benchmarks.failures`."""
