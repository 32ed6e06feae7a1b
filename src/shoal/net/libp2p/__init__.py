"""The real network, on hivemind's libp2p daemon and DHT.

Only this package imports hivemind. It imports `shoal.net` (not `shoal.net.memory`), `shoal.policy.census` and
`clocks`, and below.
"""
