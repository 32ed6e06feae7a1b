"""What is computed: a model cut into the blocks of a server and the head of a client.

It knows PyTorch, Transformers and PEFT, and nothing of networks, servers or sessions. It imports the ground only.
"""
