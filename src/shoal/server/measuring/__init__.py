"""What a server finds out about itself and announces: its capacity, its network, its disk and its place.

It imports what is below `shoal.server`, and the server's model code. Decisions are in `shoal.policy`.
"""
