"""A session: a pipeline of stages on servers, the inputs that each was given, and how a lost server is replaced.

It imports `shoal.client.swarm`, `shoal.client.head` and below; nothing of training.
"""
