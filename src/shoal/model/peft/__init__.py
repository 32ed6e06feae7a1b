"""Adapters and soft prompts that clients add to a model, described by their factors or as layers of PEFT.

It imports the ground and the other modules of `shoal.model`, except for head, body and loading.
"""
