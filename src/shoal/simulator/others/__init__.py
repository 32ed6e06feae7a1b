"""Rules of other systems, written from their papers, to compare with. No live server uses them.

It imports `shoal.simulator.fluid` and below, `shoal.policy` and the ground.
"""
