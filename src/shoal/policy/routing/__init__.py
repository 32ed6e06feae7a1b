"""Which servers a client goes through: what a step costs on each, and the best route over them.

It is pure, as all of `shoal.policy` is, and imports the ground, the limits of `shoal.protocol`, `shoal.policy.view` and
the machines of `shoal.policy.placement`.
"""
