"""`shoal dht`: a peer that holds no blocks, for others to join by."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import options
from shoal.cli.console import start_logging, waiting
from shoal.cli.identity import identity_file
from shoal.cli.lifetime import end_with_parent, run_until_signalled

if TYPE_CHECKING:
    from shoal.net import NetworkConfig


def command(
    initial_peers: options.InitialPeers = None,
    host: options.Host = "0.0.0.0",  # noqa: S104
    port: options.Port = 0,
    identity: options.IdentityFile = None,
    announce: options.Announce = None,
    serve_relay: Annotated[
        bool,
        typer.Option(
            "--serve-relay",
            help="Also carry the streams of servers that nobody can dial.",
        ),
    ] = False,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
    verbose: options.Verbose = False,
) -> None:
    """Run a peer without blocks, for others to join by.

    It is small, and steady while servers come and go. Without --initial-peers it starts a swarm. Its address stays the
    same if its --port does.
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
        run_until_signalled(_keep(replace(network, identity=path)))


async def _keep(network: NetworkConfig) -> None:
    from shoal.net import join

    with waiting("Joining the swarm" if network.initial_peers else "Starting the network") as wait:
        async with join(network) as node:
            wait.stop()
            print(f"peer      {node.transport.peer}")
            for address in node.transport.addresses:
                print(f"address   {address}")
            print("\nServe a model through it:")
            print(f"  shoal serve MODEL --initial-peers {node.transport.addresses[0]}\n", flush=True)
            await asyncio.Event().wait()
