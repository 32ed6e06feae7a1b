"""A session: a pipeline of stages on servers, the inputs that each was given, and how a lost server is replaced.

It imports `shoal.client.swarm` and below, and nothing of training.
"""
