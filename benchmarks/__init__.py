"""Benchmarks, soak tests and studies. Each is run as a module: `python -m benchmarks.table`.

Each compares both sides in one run on one machine, and prints ratios and medians. `benchmarks/results` has dated
results with the name of the machine. A benchmark of several modules has a package; `common` is for all. Benchmarks may
import all of shoal, and some tests import them.
"""
