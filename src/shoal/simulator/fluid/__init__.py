"""Which blocks are where while machines come and go. Throughput follows from formulas; no token is simulated.

It imports `shoal.simulator.world` and `timeline`, `shoal.policy`, `shoal.net.records` and `identity`, and the ground.
"""
