"""How a machine joins a swarm with nothing but an invite code: the code, what it vouches for, and the weights.

It imports `shoal.net`, `shoal.model.weights` and below. Servers invite with it, and the command line joins with it.
"""
