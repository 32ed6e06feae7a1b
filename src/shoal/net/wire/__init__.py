"""How messages become bytes and back: frames, the codec, the encodings of tensors, packing without loss.

Nothing here opens a connection. It imports `shoal.net.transport`, `shoal.policy.network`, `shoal.protocol` and the
ground.
"""
