"""Linear layers in the forms in which they compute fastest or take least memory: packed, int8, NF4.

It imports the ground only.
"""
