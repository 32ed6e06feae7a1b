"""When what is computed: the loop, its requests, their validation, and the compute thread.

It imports `shoal.server.speed_watch`, `shoal.server.kv`, `shoal.server.training` and below.
"""
