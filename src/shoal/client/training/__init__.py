"""Passes with gradients: microbatches through the swarm, forward and backward.

It imports `shoal.client.swarm` and below, and nothing of decoding.
"""
