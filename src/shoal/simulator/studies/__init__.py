"""Questions to the simulator, each with a table, a plot and a part of docs/scale.md.

It imports the rest of `shoal.simulator`, except for `serving`; `shoal.policy`, `shoal.host` and the ground.
"""
