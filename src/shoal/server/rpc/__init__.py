"""What clients and other servers say to a server: their streams, a session's steps in order, and pushes.

It parses and answers; the engine computes. It imports the engine and below.
"""
