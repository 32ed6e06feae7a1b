"""What commands need that run until they are stopped: options from a file, several devices, a clean end.

It imports what several commands share (`shoal.cli.options`, `shoal.cli.terminal`, `shoal.cli.nearby`), and no command.
"""
