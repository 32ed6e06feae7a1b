"""Each step of each client: servers that compute waiting steps together, links, failures, replays.

It imports `shoal.simulator.fluid` and below, `shoal.policy`, the limits of `shoal.protocol`, and the ground.
"""
