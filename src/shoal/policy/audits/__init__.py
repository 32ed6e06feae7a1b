"""How a client finds servers that compute something else than they should: what it compares, how often, who is blamed.

It imports the ground, and compares numbers, not tensors.
"""
