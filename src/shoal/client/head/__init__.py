"""The output head of a client: computed by a server, or here, packed or quantized.

It imports `shoal.model` and below, and nothing of the client.
"""
