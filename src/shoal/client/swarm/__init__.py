"""What a client knows of servers, and how it talks to one: directory, health, connections, and the one retry loop.

It imports the client's options and history, `shoal.net`, `shoal.policy` and below.
"""
