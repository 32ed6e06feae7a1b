"""What a client knows of servers and how it talks to one: the directory, health, connections, and the one retry loop.

It imports `shoal.net`, `shoal.policy` and below.
"""
