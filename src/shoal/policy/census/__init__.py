"""How many servers there are, where their records are kept, and which of them a peer reads about.

It imports the ground, `shoal.policy.view` and `shoal.policy.machines`. Times and `random.Random` are arguments.
"""
