"""Swarms and servers in virtual time, decided by the live functions of `shoal.policy`.

It may import everything but `shoal.cli` and `shoal.testing`; nothing imports it.
"""
