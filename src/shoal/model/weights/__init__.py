"""Where weights come from: files in a folder or on the hub, their tensors, and their fingerprint.

Nothing here computes with them. It imports the ground and `shoal.model.families`.
"""
