"""How messages become bytes and back: frames, the codec, the encodings of tensors.

Nothing here opens a connection. It imports `shoal.net.transport`, `shoal.protocol` and the ground.
"""
