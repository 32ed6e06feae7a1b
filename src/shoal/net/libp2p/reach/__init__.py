"""How others reach this peer: whether they can dial it, and its places at relays where they cannot.

It imports `shoal.net.libp2p.daemon` and `libp2p_stream`, `shoal.net.wire`, `shoal.policy.reachability` and below.
"""
