"""The server: it chooses blocks, loads them, announces them, and computes them for clients.

These modules assemble a server, and do what it does once or now and then. Requests are the packages' below. It imports
`shoal.model`, `shoal.net`, `shoal.policy` and below, and nothing of the client.
"""
