"""What the benchmarks share: models of chosen shapes, swarms, clients, and how this machine is called.

It imports shoal and no other benchmark.
"""
