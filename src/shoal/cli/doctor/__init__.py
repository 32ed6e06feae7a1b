"""`shoal doctor`: whether this machine is fit to serve, and whether others reach it; what to do about what is not.

`facts` looks, `diagnosis` judges. It imports what commands may.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from shoal.cli import network_options, options
from shoal.cli.doctor.diagnosis import Finding, Health, diagnose
from shoal.cli.doctor.facts import Facts, SwarmFacts, look_at_machine, look_at_swarm
from shoal.cli.network_options import network_of
from shoal.cli.terminal.console import start_logging, stdout, waiting
from shoal.concurrency import in_thread
from shoal.errors import ShoalError
from shoal.joining.invite_code import InviteCode
from shoal.net import NetworkConfig

STYLES = {Health.FINE: "green", Health.NOTE: "yellow", Health.PROBLEM: "bold red"}
SIGNS = {Health.FINE: "ok", Health.NOTE: "note", Health.PROBLEM: "problem"}


def command(
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="An invite code of the swarm that this machine is to be in.")
    ] = None,
    initial_peers: options.InitialPeers = None,
    swarm_key: network_options.SwarmKeyFile = None,
    host: network_options.Host = None,
    port: network_options.Port = 0,
    announce: network_options.Announce = None,
    relay: network_options.Relay = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Look whether this machine can serve, and whether others reach it; say what to do about what is wrong.

    With a code or --initial-peers, it joins that swarm for some seconds as a server would, with the same --port and
    --announce, and members dial it back. The exit status is 1 if there is a problem.
    """
    start_logging(verbose=verbose)
    wanted = None if code is None else options.checked_code(code)
    network = network_of(
        initial_peers=options.peers_of(initial_peers),
        host=host,
        port=port,
        announce=announce,
        relay=relay,
        serve_relay=False,
        swarm_key=swarm_key if code is None else network_options.key_beside_code(swarm_key),
    )
    facts = look(network, wanted)
    findings = diagnose(facts)
    is_well = all(each.health is not Health.PROBLEM for each in findings)
    if as_json:
        print(json.dumps({"ok": is_well, "findings": [asdict(each) for each in findings]}, indent=2))
    else:
        show(findings)
    if not is_well:
        raise typer.Exit(1)


def look(network: NetworkConfig, code: InviteCode | None) -> Facts:
    """All facts. What keeps this machine out of the swarm is one of them."""
    if code is None and not network.initial_peers:
        return Facts(look_at_machine())
    with waiting("Joining the swarm, and asking members to dial this machine back"):
        return asyncio.run(_look(network, code))


async def _look(network: NetworkConfig, code: InviteCode | None) -> Facts:
    """Those of the machine too, whose GPUs may need seconds to answer."""
    async with in_thread(look_at_machine) as machine:
        try:
            swarm = await _join(network, code)
        except ShoalError as failure:
            return Facts(await machine, failure=failure)
        return Facts(await machine, swarm)


async def _join(network: NetworkConfig, code: InviteCode | None) -> SwarmFacts:
    if code is None:
        return await look_at_swarm(network)
    from shoal.joining.arrival import network_by

    by_code = await network_by(code, network, waits_for_all=True)  # it says which are silent
    silent = [way for way in code.ways if not any(each.startswith(f"{way.address}/") for each in by_code.initial_peers)]
    return replace(
        await look_at_swarm(by_code),
        num_ways=len(code.ways),
        silent_ways=tuple(f"{way.host} port {way.port}" for way in silent),
    )


def show(findings: list[Finding]) -> None:
    """Print the findings as a table, with what to do under each."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for each in findings:
        text = Text(each.text)
        if each.hint:
            text.append(f"\n{each.hint}", style="dim")
        table.add_row(each.subject, Text(SIGNS[each.health], style=STYLES[each.health]), text)
    stdout.print(table)
