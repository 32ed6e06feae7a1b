"""What the commands write to a terminal or a log: progress, errors, tables, stories and the help.

It imports `shoal.policy`, `shoal.protocol`, the events and the ground, and no command.
"""
