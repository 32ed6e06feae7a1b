"""The program `python -m shoal.simulator`: one subcommand for each study."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.simulator.studies.report import Report, write

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study. Returns the exit status: 0, 1 if it failed, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        report, draw = options.study(options)
        print(report.text())
        if options.out is not None:
            write(report, options.out, draw, options.page)
    except ShoalError as failure:
        print(f"error: {failure}", file=sys.stderr)
        if failure.hint:
            print(f"hint: {failure.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


Drawn = tuple[Report, Callable[[Any], None] | None]


def _side_by_side(options: argparse.Namespace) -> Drawn:
    from shoal.simulator.studies import side_by_side
    from shoal.simulator.studies.study_progress import progress

    grid = _grid(options)
    with progress("side by side") as advance:
        found = side_by_side.run_all(grid, advance, jobs=options.jobs)
    name = "side-by-side-traces" if options.only_traces else "side-by-side"  # so that one does not replace the other
    return side_by_side.report(grid, found, name), lambda figure: side_by_side.draw(grid, found, figure)


def _balance(options: argparse.Namespace) -> Drawn:
    from shoal.simulator.studies import balance
    from shoal.simulator.studies.study_progress import progress

    grid = _grid(options)
    with progress("balance") as advance:
        found = balance.run_all(grid, advance, num_tries=options.tries)
    return balance.report(found, grid), lambda figure: balance.draw(found, figure)


def _at_rest(options: argparse.Namespace) -> Drawn:
    from shoal.errors import UserError
    from shoal.simulator.studies import at_rest
    from shoal.simulator.studies.study_progress import progress
    from shoal.simulator.world.clusters import read_clusters

    clusters = [cluster for path in options.cluster for cluster in read_clusters(path)]
    clusters += [] if options.only_clusters else at_rest.random_clusters(options.seed)
    if options.only:
        clusters = [cluster for cluster in clusters if any(word in cluster.name for word in options.only)]
    if not clusters:
        raise UserError("no swarm is left to simulate", hint="name clusters with --cluster, or leave out --only")
    with progress("at rest") as advance:
        rests = [
            at_rest.study(
                cluster,
                options.rules or at_rest.RULES,
                num_tries=options.tries,
                seed=options.seed,
                advance=lambda share, now: advance(share / len(clusters), now),
            )
            for cluster in clusters
        ]
    return at_rest.report(rests), None


def _ten_thousand(options: argparse.Namespace) -> Drawn:
    from shoal.simulator.studies import ten_thousand

    sizes = [
        ten_thousand.Size(options.servers, blocks, options.clients, options.quiet, options.busy)
        for blocks in options.blocks
    ]
    found = ten_thousand.study_all(sizes, seed=options.seed, jobs=options.jobs)
    return ten_thousand.report(found), None


def _fit(options: argparse.Namespace) -> Drawn:
    from shoal.simulator.studies import fits
    from shoal.simulator.world.clusters import read_clusters
    from shoal.simulator.world.traces import read_trace

    traces = [(path.stem, read_trace(path)) for path in options.trace]
    clusters = [cluster for path in options.cluster for cluster in read_clusters(path)]
    found = [fit for name, trace in traces for fit in fits.fits(name, trace)]
    return fits.report(traces, found, clusters), lambda figure: fits.draw(found, figure)


def _calibrate(options: argparse.Namespace) -> Drawn:
    from shoal.simulator.steps.twin import RealSwarm
    from shoal.simulator.studies import calibrate
    from shoal.simulator.world.json_files import read_json

    swarm = read_json(options.measured, RealSwarm)
    compared = calibrate.compare(swarm)
    return calibrate.report(swarm, compared), lambda figure: calibrate.draw(compared, figure)


def _contribution(options: argparse.Namespace) -> Drawn:
    from shoal.simulator.studies import contenders

    return contenders.report(options.seed), None


def _grid(options: argparse.Namespace) -> Any:
    from shoal.errors import UserError
    from shoal.simulator.fluid.arrangement import Delays
    from shoal.simulator.studies.rule_names import RULES, rule_of
    from shoal.simulator.studies.settings import GENERATED, traced_settings
    from shoal.simulator.studies.side_by_side import RunGrid
    from shoal.simulator.world.traces import read_trace

    settings = [] if options.only_traces else list(GENERATED)
    for path in options.trace:
        settings += traced_settings(path.stem, read_trace(path))
    if options.only:
        settings = [setting for setting in settings if any(word in setting.name for word in options.only)]
    if not settings:
        raise UserError("no churn is left to simulate", hint="name traces with --trace, or leave out --only")
    rules = options.rules or list(RULES)
    for rule in rules:
        rule_of(rule)
    delays = Delays(view=options.view_seconds, vanish=options.vanish_seconds, noticed=options.notice_seconds)
    seeds = range(options.seed, options.seed + options.runs)
    return RunGrid(settings, rules, seeds, options.hours, delays, options.load_seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shoal.simulator", description=__doc__)
    studies = parser.add_subparsers(required=True, metavar="STUDY")

    def add(name: str, study: Callable[[argparse.Namespace], Drawn], about: str) -> argparse.ArgumentParser:
        command = studies.add_parser(name, help=about, description=about)
        command.set_defaults(study=study)
        command.add_argument("--seed", type=int, default=0, help="equal seeds give equal results")
        command.add_argument("--out", type=Path, help="a folder for the table and the plot")
        command.add_argument("--page", type=Path, help="a page in Markdown that has a place for the table")
        return command

    add_churn(add("side-by-side", _side_by_side, "rules for joining and moving, in swarms that change"))
    balance = add("balance", _balance, "how near the optimum load balancing keeps a swarm")
    add_churn(balance)
    balance.add_argument("--tries", type=int, default=20_000, help="moves that the offline search tries")
    rest = add("at-rest", _at_rest, "placements of swarms that do not change, and of clusters from files")
    rest.add_argument("--cluster", type=Path, nargs="+", default=[], help="files with clusters (docs/scale.md)")
    rest.add_argument("--only-clusters", action="store_true", help="no random swarms")
    rest.add_argument("--only", nargs="+", help="only the swarms whose names have one of these words")
    rest.add_argument("--rules", nargs="+", help="by default all")
    rest.add_argument("--tries", type=int, default=50_000, help="moves that the offline search tries")
    large = add("ten-thousand", _ten_thousand, "ten thousand servers with churn and clients")
    large.add_argument("--servers", type=int, default=10_000)
    large.add_argument("--blocks", type=int, nargs="+", default=[80, 126])
    large.add_argument("--clients", type=int, default=5_000)
    large.add_argument("--jobs", type=int, default=1, help="sizes at the same time")
    large.add_argument("--quiet", type=float, default=1800.0, help="virtual seconds before the clients come")
    large.add_argument("--busy", type=float, default=60.0, help="virtual seconds with clients")
    fit = add("fit", _fit, "the generators' parameters, fitted to traces and clusters")
    fit.add_argument("--trace", type=Path, nargs="+", required=True, help="files with traces (docs/scale.md)")
    fit.add_argument("--cluster", type=Path, nargs="+", default=[], help="files with clusters (docs/scale.md)")
    calibrate = add("calibrate", _calibrate, "a swarm of real processes and its simulated twin")
    calibrate.add_argument("--measured", type=Path, required=True, help="what benchmarks/calibration.py has written")
    add("contribution", _contribution, "who gets how much where contribution earns priority, and who waits")
    return parser


def add_churn(command: argparse.ArgumentParser) -> None:
    """The options of studies in which machines come and go."""
    command.add_argument("--trace", type=Path, nargs="+", default=[], help="files with traces (docs/scale.md)")
    command.add_argument("--only-traces", action="store_true", help="no generated churn")
    command.add_argument("--only", nargs="+", help="only the churn whose names have one of these words")
    command.add_argument("--rules", nargs="+", help="by default all")
    command.add_argument("--hours", type=float, default=8.0)
    command.add_argument("--runs", type=int, default=3, help="with seeds that follow on the first")
    command.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    command.add_argument("--load-seconds", type=float, default=60.0, help="to load all blocks that a machine can hold")
    command.add_argument("--view-seconds", type=float, default=20.0, help="how old views may be")
    command.add_argument("--notice-seconds", type=float, default=2.0, help="until its watchers miss a server")
    command.add_argument("--vanish-seconds", type=float, default=50.0, help="until its record is gone")


if __name__ == "__main__":
    sys.exit(main())
