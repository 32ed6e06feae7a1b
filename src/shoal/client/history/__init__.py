"""The inputs that servers were given: the client's copy, in memory or in a file, exact or in fewer bytes.

It imports `shoal.net.wire` and below, and nothing of the client.
"""
