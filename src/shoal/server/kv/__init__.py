"""Where sessions keep their keys and values: pages, the attention over them, and one pass for many sessions.

It imports `shoal.server.step_inputs`, `shoal.model` and below.
"""
