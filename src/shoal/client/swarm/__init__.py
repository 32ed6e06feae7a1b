"""What a client knows of servers, and how it talks to one: directory, health, connections, and the one retry loop.

It imports `options` and `history` of `shoal.client`, `shoal.net`, `shoal.model.peft.factors`, `shoal.policy` and below.
"""
