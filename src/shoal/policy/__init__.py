"""Every decision, pure: routes, costs, placement, moving, batching, health.

Time, a `random.Random` and a view of the swarm are arguments; nothing here reads a clock, draws from a global generator
or does I/O. It imports the ground only.
"""
