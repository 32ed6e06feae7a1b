"""`python -m shoal.simulator.serving`: compare the rules by which a server could divide its time and its pages."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from shoal.errors import ShoalError
from shoal.simulator.serving.comparison import Policy, Row, chosen_policies, compare, policies, saturation
from shoal.simulator.serving.generations import WORKLOADS, Generation, generations, read_trace
from shoal.simulator.serving.job_tables import legend, plot, table
from shoal.simulator.serving.page_counts import PAGE_TOKENS
from shoal.simulator.serving.server_setup import ServerSetup

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
DEFAULTS = ServerSetup()
LOADS = (0.3, 0.9)


def command(
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Compare this policy. May be repeated. Default: all.")
    ] = None,
    load: Annotated[
        list[float] | None,
        typer.Option(
            min=0.01,
            metavar="PART",
            help="The rate of arrivals, as a part of what the server can do under its default rule. May be repeated. "
            f"Default: {' and '.join(map(str, LOADS))}.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=8, metavar="N", help="How many generations.")] = 1000,
    lengths: Annotated[
        str, typer.Option(metavar="KIND", help=f"Lengths of prompts and answers: {', '.join(WORKLOADS)}.")
    ] = "chat",
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Read jobs from a CSV file with the columns seconds, prompt, answer, or from one of Azure's traces.",
        ),
    ] = None,
    cache_tokens: Annotated[
        int, typer.Option(min=PAGE_TOKENS, metavar="N", help="The size of the server's cache.")
    ] = DEFAULTS.num_pages * PAGE_TOKENS,
    pass_ms: Annotated[float, typer.Option(min=0.01, metavar="MS", help="What each pass takes.")] = 1000
    * DEFAULTS.pass_seconds,
    token_ms: Annotated[float, typer.Option(min=0.0, metavar="MS", help="What each new token adds to a pass.")] = 1000
    * DEFAULTS.token_seconds,
    pair_us: Annotated[
        float, typer.Option(min=0.0, metavar="US", help="What each pair of tokens in attention adds to a pass.")
    ] = 1e6 * DEFAULTS.pair_seconds,
    seed: Annotated[int, typer.Option(metavar="N", help="Equal seeds give equal tables.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the results, if matplotlib is installed.")
    ] = None,
) -> None:
    """Compare rules for one server: how long generations take under each of them, in virtual time."""
    setup = replace(
        DEFAULTS,
        num_pages=cache_tokens // PAGE_TOKENS,
        pass_seconds=pass_ms / 1000,
        token_seconds=token_ms / 1000,
        pair_seconds=pair_us / 1e6,
    )
    for name in policy or ():
        if name not in policies(setup):
            raise typer.BadParameter(f"{name!r}: choose among {', '.join(policies(setup))}", param_hint="--policy")
    chosen, loads = chosen_policies(setup, policy or ()), load or list(LOADS)
    if trace is not None:
        all_jobs = read_trace(trace, max_jobs=jobs, seed=seed)
    elif lengths in WORKLOADS:
        all_jobs = generations(WORKLOADS[lengths], jobs, rate=1.0, seed=seed)
    else:
        raise typer.BadParameter(f"{lengths!r}: choose one of {', '.join(WORKLOADS)}", param_hint="--lengths")
    rate, rows = _compared(all_jobs, setup, chosen, loads)
    if plot_file is not None:
        plot(
            rows,
            plot_file,
            title=f"One server, {len(all_jobs)} generations, {setup.num_pages * PAGE_TOKENS} tokens of cache",
        )
    if as_json:
        results = {"jobs_per_second_at_saturation": rate, "seed": seed, "rows": [row.as_dict() for row in rows]}
        print(json.dumps(results, indent=2))
        return
    print(legend(chosen))
    for each in loads:
        print(f"\nload {each:g}: {each * rate:.3g} generations per second\n\n{table(rows, each)}")


def _compared(
    jobs: Sequence[Generation], setup: ServerSetup, chosen: Sequence[Policy], loads: Sequence[float]
) -> tuple[float, list[Row]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("what the server can do", total=len(loads) * len(chosen) * len(jobs))
        rate = saturation(jobs, setup)
        if not console.is_terminal:
            console.print(f"the server can do {rate:.3g} generations per second")

        def show(policy: str, load: float, num_completed: int) -> None:
            progress.update(task, description=f"{policy} at load {load:g}", advance=1)
            if num_completed == len(jobs) and not console.is_terminal:
                console.print(f"{policy} at load {load:g}: done")

        return rate, compare(jobs, chosen, loads, saturated_rate=rate, on_progress=show)


def run(arguments: Sequence[str]) -> int:
    """Run the command, and print its error if it fails. Returns the exit status."""
    app = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
    app.command()(command)
    try:
        program = typer.main.get_command(app)
        return program.main(list(arguments), prog_name="python -m shoal.simulator.serving", standalone_mode=False) or 0
    except ShoalError as error:
        _print_error(str(error), error.hint)
        return FAILED
    except typer.TyperException as error:
        _print_error(error.format_message(), "--help lists the options")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED


def _print_error(message: str, hint: str | None) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
