"""Passes with gradients: microbatches through the swarm, forward and back.

It imports `shoal.client.swarm` and below, and nothing of decoding.
"""
