"""Which blocks a server has: how it chooses, claims, loads and serves them, and changes to others.

It imports `shoal.server.rpc` and below, and `shoal.policy`, which decides.
"""
