"""Audits: a session has what its servers answered computed again by others, and finds out which of them lie.

It imports the other modules of `shoal.client.decoding`, `shoal.policy.audits` and below.
"""
