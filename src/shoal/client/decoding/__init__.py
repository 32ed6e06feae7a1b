"""A session: a pipeline of stages on servers, what they were given, and how a lost one is replaced.

It imports `shoal.client.swarm` and below, and nothing of training.
"""
