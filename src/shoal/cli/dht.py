"""`shoal dht`: a bootstrap peer. It holds no blocks; other peers join the swarm through it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import options
from shoal.cli.long_running import end_with_parent, identity_file, run_until_signalled
from shoal.cli.terminal.console import start_logging, waiting
from shoal.cli.terminal.notify import notify

if TYPE_CHECKING:
    from shoal.net import NetworkConfig


ServeRelay = Annotated[
    bool | None,
    typer.Option(
        "--serve-relay/--no-serve-relay",
        help="Carry connections to members that others cannot dial. Default: if this machine has a public address.",
        show_default=False,
    ),
]


def command(
    initial_peers: options.InitialPeers = None,
    host: options.Host = None,
    port: options.Port = 0,
    identity: options.IdentityFile = None,
    announce: options.Announce = None,
    serve_relay: ServeRelay = None,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
    verbose: options.Verbose = False,
) -> None:
    """Run a bootstrap peer: it serves no blocks, and lets others join.

    It needs little memory, and its address stays valid while servers come and go, as long as its --port is the same.
    Without --initial-peers it starts a new swarm.
    """
    start_logging(verbose=verbose, default="warning", progress=True)
    if exit_with_stdin:
        end_with_parent()
    from shoal.net import NetworkConfig, check_addresses

    network = NetworkConfig(
        initial_peers=options.peers_of(initial_peers),
        host=host,
        port=port,
        announce=tuple(announce or ()),
        serve_relay=serve_relay,
    )
    check_addresses(network)
    with identity_file(identity, kind="dht") as path:
        run_until_signalled(_run(replace(network, identity=path)))


async def _run(network: NetworkConfig) -> None:
    from shoal.net import join

    with waiting("Joining the swarm" if network.initial_peers else "Starting the network") as progress:
        async with join(network) as node:
            progress.stop()
            notify(READY="1", STATUS="Introducing peers to each other")
            print(f"peer      {node.transport.peer}")
            for address in node.transport.addresses:
                print(f"address   {address}")
            print("\nServe a model in this swarm:")
            print(f"  shoal serve MODEL --initial-peers {node.transport.addresses[0]}\n", flush=True)
            await asyncio.Event().wait()
