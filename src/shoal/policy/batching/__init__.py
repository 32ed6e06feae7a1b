"""What a server computes next for whom: the tokens of a pass, pages of the cache, and limits for each client.

It imports the ground.
"""
