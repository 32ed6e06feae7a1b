"""Where weights come from: files in a folder or on the Hugging Face hub, their tensors, and their fingerprint.

Nothing here computes with weights. It imports the ground, `shoal.host` and `shoal.model.families`.
"""
