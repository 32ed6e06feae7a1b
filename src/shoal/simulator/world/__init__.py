"""Machines, places, and when machines come and go: drawn at random with a seed, or read from files that users name.

It imports `shoal.policy.machines`, the limits of `shoal.protocol`, and the ground.
"""
