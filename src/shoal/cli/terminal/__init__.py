"""What the commands write to a terminal or a log: progress, errors, tables, stories and the help.

It imports `shoal.client.options` for what is shown of them, `shoal.policy` and below, and no command.
"""
