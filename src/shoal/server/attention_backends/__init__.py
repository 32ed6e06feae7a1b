"""Attention that is faster than the reference, where the device has it and it gives the reference's numbers.

It imports `shoal.server.kv`, `shoal.model` and below.
"""
