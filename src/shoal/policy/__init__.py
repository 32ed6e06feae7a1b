"""Every decision, pure: routes, costs, placement, moving, batching, health, neighbors.

Time, a `random.Random` and a view of the swarm are arguments. Nothing here reads a clock, draws from the global random
generator or does I/O. It imports the ground and the limits of `shoal.protocol`.
"""
