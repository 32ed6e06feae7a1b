"""How others reach this peer: whether they can dial it, and its places at relays where they cannot.

It imports `daemon`, `strangers` and `libp2p_stream` of `shoal.net.libp2p`, `shoal.net.wire`, `shoal.policy.network`
and below.
"""
