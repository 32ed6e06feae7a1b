"""What servers push to each other for their clients: steps of sessions, and the inputs of passes.

It imports `shoal.server.refusals`, `shoal.net`, `shoal.protocol` and the ground; not the engine, nor the rest of `rpc`.
"""
