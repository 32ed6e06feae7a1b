"""What the user asks for, by keywords: checked, and in one frozen value.

It imports `shoal.net`, `shoal.model` and below, and nothing of the client. `client_options` imports no PyTorch.
"""
