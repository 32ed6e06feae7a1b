"""The command line. Here: its commands, and the one place where errors become words on the terminal.

Only what is cheap is imported before a command runs: PyTorch, Transformers and hivemind take seconds.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from shoal.cli import chat, demo, dht, generate, serve, status
from shoal.cli.console import WrongUsage, is_debugging, print_error, start_logging, stderr
from shoal.cli.options import spread_peers
from shoal.errors import ShoalError

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="shoal",
    help="One large language model on many ordinary machines that come and go.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, serve, dht, generate, chat, status):
    app.command(command.__name__.rpartition(".")[2])(command.command)


def _show_version(value: bool) -> None:
    if value:
        print(f"shoal {importlib.metadata.version('shoal')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _shoal(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(WRONG_USAGE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 if it did what was asked, 1 if it failed, 2 if it was called wrongly."""
    code = run(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns its exit status."""
    try:
        start_logging(verbose=False)
        command = typer.main.get_command(app)
        code = command.main(spread_peers(arguments), prog_name="shoal", standalone_mode=False) or 0
        if code == INTERRUPTED and stderr.is_terminal:
            stderr.print("\ninterrupted", style="dim")
        return code
    except WrongUsage as error:
        print_error(str(error), error.hint)
        return WRONG_USAGE
    except ShoalError as error:
        logging.getLogger(__name__).debug("where it failed:", exc_info=error)
        print_error(str(error), error.hint)
        return FAILED
    except typer.TyperException as error:
        if message := error.format_message():
            context = getattr(error, "ctx", None)
            print_error(message, f"{context.command_path if context else 'shoal'} --help")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):  # before or after the command itself
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED
    except Exception as error:
        if is_debugging():
            logging.getLogger(__name__).critical("not expected:", exc_info=error)
        print_error(
            f"{type(error).__name__}: {error}",
            "this is a bug in shoal; run it with --verbose or SHOAL_LOG=debug for the details",
        )
        return FAILED
