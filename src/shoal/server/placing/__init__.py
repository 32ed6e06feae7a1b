"""Which blocks a server has: how it chooses, claims, loads and serves them, and changes to others.

It imports `shoal.server.rpc`, `shoal.server.measuring` and below, the modules of `shoal.server` except for `server`,
and `shoal.policy`, which decides.
"""
