"""What a client adds to a model: adapters and prompts, on the client as PEFT's layers, on the server as factors.

It imports the ground and the modules of `shoal.model` itself.
"""
