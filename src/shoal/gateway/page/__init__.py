"""The page: its files, and what it is told of the swarm while it is open.

It may import `shoal.client` and the model that is served.
"""
