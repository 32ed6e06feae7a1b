"""The page: its files, and what it is told of the swarm while it is open.

It may import the model that is served, `shoal.client` and below.
"""
