"""`shoal join`: serve some blocks of the model of a swarm, by an invite code and without a copy of the model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoal.cli import options, serve
from shoal.cli.nearby.choose_swarm import choose_swarm
from shoal.cli.terminal.console import start_logging
from shoal.cli.terminal.shown_parameters import with_options_of


@with_options_of(
    serve.command, without=("model", "new_swarm", "initial_peers", "swarm_key", "dtype", "quantization", "revision")
)
def command(
    code: Annotated[
        str | None,
        typer.Argument(
            metavar="CODE",
            help="An invite code, as members of the swarm print it. Without one: choose a swarm of the local network.",
        ),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes/--no-yes", "-y", help="Without a code: join the swarm that is heard, if it is the only one."
        ),
    ] = False,
    **values: Any,
) -> None:
    """Join a swarm and serve some blocks of its model, until Ctrl-C.

    CODE is what any member of the swarm prints (`shoal invite`). It names the swarm, the exact weights and their form.
    The blocks, the config and the tokenizer come from members, and each piece is checked before it is used; they stay
    on the disk for the next time.
    """
    if code is None:
        start_logging(verbose=values["verbose"], default="warning", progress=True)
        serve.check_options(**values)
        code = str(choose_swarm(yes=yes))
    options.checked_code(code)  # a mistyped code is told at once
    serve.command(
        model=code,
        new_swarm=False,
        initial_peers=None,
        swarm_key=None,
        dtype=options.DType.auto,
        quantization=options.Quantization.none,
        revision=None,
        **values,
    )
