"""The program `shoal`, also run as `python -m shoal`."""

import sys

INTERRUPTED = 130
"""The exit status after Ctrl-C: 128 plus the number of SIGINT, as shells have it."""


def main() -> None:
    """Run the command line. Ctrl-C ends it without a traceback, even during the imports."""
    try:
        from shoal.cli import main as run_command

        run_command()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
