"""Benchmarks: `python -m bench <suite>` from the root of the checkout."""
