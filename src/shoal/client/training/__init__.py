"""Passes with gradients: microbatches through the swarm, forward and backward.

It imports `shoal.client.swarm` and below, and `call_inputs` and `runtime` of `shoal.client`; nothing of decoding.
"""
