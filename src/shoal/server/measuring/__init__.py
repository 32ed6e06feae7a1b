"""What a server finds out about itself and announces: its capacity, its network, its disk and its place.

It imports `shoal.server.kv`, the modules of `shoal.server` except for `server`, and what is below `shoal.server`.
"""
