"""Weights that come from other members: the list of their pieces, what is here of them, and files made of them.

It imports the other modules of `shoal.model.weights` and below.
"""
