"""What the user asks for, by keywords and config attributes: checked, and in one frozen value.

It imports `shoal.net`, `shoal.model` and below, and of the client only `swarm`. `client_options` imports no PyTorch.
"""
