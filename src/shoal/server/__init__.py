"""The server: it chooses blocks, loads them, announces them, and computes them for everybody.

Here is the assembly and what a server does once or now and then; requests live in the rooms below. It imports
`shoal.model`, `shoal.net`, `shoal.policy` and below, and nothing of the client.
"""
