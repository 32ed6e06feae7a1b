"""Linear layers whose weights are held in another form, to compute faster or to take less memory: packed, int8, NF4.

It imports the ground and `shoal.model.families`.
"""
