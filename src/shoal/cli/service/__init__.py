"""What commands need that run as a service: options from a file.

It imports what several commands share (`shoal.cli.options`, `shoal.cli.terminal`), and no command.
"""
