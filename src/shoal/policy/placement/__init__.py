"""Which blocks a server holds, and when it moves: decided alike by all servers, each for itself, and by the simulator.

It imports the ground, `shoal.policy.machines` and `shoal.policy.view`. Times and `random.Random` are arguments, as
everywhere in `shoal.policy`.
"""
