"""Where peers are: multiaddresses, this machine's own hosts, and how others reach them in words.

It imports `shoal.net.identity`, `shoal.policy.network` and the ground, and nothing slow.
"""
