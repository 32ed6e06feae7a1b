"""What the user asks for: keywords and config attributes, checked, and as one frozen value.

It imports `shoal.net`, `shoal.model` and below; of the client only its `swarm`.
"""
