"""Benchmarks, soaks and studies, each run as a module: `python -m benchmarks.table`.

They compare in one run on one machine, and print ratios and medians. Results are in `benchmarks/results`, dated, with
the machine named. They may import all of shoal; nothing imports them.
"""
