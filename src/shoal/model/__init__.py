"""The computation: a model that is cut into the blocks of servers and the head of a client.

It uses PyTorch, Transformers and PEFT, and knows nothing about networks, servers or decoding. It imports the ground and
`shoal.host`.
"""
