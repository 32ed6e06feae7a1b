"""What a peer decides about its network: do others reach it, how fast is it, whose clock is wrong, who gets how much?

It imports the ground only.
"""
