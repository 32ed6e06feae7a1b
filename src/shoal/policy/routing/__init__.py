"""Which servers a client goes through: what a step costs on each, and the best chain of them.

Pure, as all of `shoal.policy`. It imports the ground and `shoal.policy.view`.
"""
