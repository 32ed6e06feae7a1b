"""The command line: one module for each command, and what several commands share.

It may import everything but `shoal.testing`. Modules import PyTorch, Transformers and hivemind inside functions only:
these imports take seconds, and `--help` and wrong usage need an immediate answer. This file lists the commands, and is
the only place that turns exceptions into error messages and exit statuses.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from shoal.cli import chat, demo, dht, doctor, gateway, generate, invite, join, plan, serve, status, up
from shoal.cli.network_options import spread_peers
from shoal.cli.service.config_file import with_config_file
from shoal.cli.service.long_running import end_now
from shoal.cli.terminal.console import FAILED, WRONG_USAGE, WrongUsage, is_debugging, print_error, start_logging, stderr
from shoal.cli.terminal.grouped_help import GroupedCommand
from shoal.errors import ShoalError

INTERRUPTED = 130

app = typer.Typer(
    name="shoal",
    help="Run one large language model on many machines that may join and leave.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
LONG_RUNNING = (up, join, serve, dht, gateway)
for module in (demo, plan, up, join, serve, invite, dht, gateway, generate, chat, status, doctor):
    command = with_config_file(module.command) if module in LONG_RUNNING else module.command
    app.command(module.__name__.rpartition(".")[2], cls=GroupedCommand)(command)


def _show_version(value: bool) -> None:
    if value:
        print(f"shoal {importlib.metadata.version('shoal')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _shoal(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(WRONG_USAGE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: with 0 on success, 1 on failure, 2 on wrong usage.

    As the program, without `arguments`, it leaves out the interpreter's end once PyTorch was imported: that takes a
    second of a core, and commands have closed by then what they have opened.
    """
    code = run(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if arguments is None and "torch" in sys.modules:
        end_now(code)
    sys.exit(code)


def share_cores() -> None:
    """Let threads that wait for others of a product sleep, unless the user has chosen. To be called before PyTorch is.

    Awake, they keep the others off the cores as soon as any program computes beside: a step of 0.1 s then takes 1 to 3.
    Where nothing else runs, sleeping costs some percent.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run(arguments: Sequence[str]) -> int:
    """Run a command, and print its error if it fails. Returns the exit status."""
    share_cores()
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
        logging.getLogger(__name__).debug("traceback of the error:", exc_info=error)
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
            logging.getLogger(__name__).critical("unexpected error:", exc_info=error)
        print_error(
            f"{type(error).__name__}: {error}",
            "this is a bug in shoal; --verbose or SHOAL_LOG=debug prints the traceback",
        )
        return FAILED
