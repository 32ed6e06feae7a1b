"""Swarms on the local network: commands that serve announce theirs, and `shoal join` without a code lists them.

What an announcement is, where it may be heard and what of it is believed is decided in `shoal.joining`.
"""
