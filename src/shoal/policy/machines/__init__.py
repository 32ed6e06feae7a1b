"""The machines of a swarm: what each could hold and compute, how long it stays, and what all of them carry together.

It imports the ground and `shoal.policy.view`.
"""
