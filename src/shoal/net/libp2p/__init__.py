"""The network on hivemind's libp2p daemon and hash table.

The only place that imports hivemind; above it, everything is `shoal.net.transport`.
"""
