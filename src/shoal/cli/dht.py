"""`shoal dht`: a bootstrap peer. It holds no blocks; other peers join the swarm through it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import network_options, options
from shoal.cli.network_options import network_of
from shoal.cli.service.long_running import end_with_parent, identity_file, run_until_signalled
from shoal.cli.terminal.console import start_logging, waiting
from shoal.cli.terminal.notify import notify

if TYPE_CHECKING:
    from shoal.net import NetworkConfig


def command(
    initial_peers: options.InitialPeers = None,
    swarm_key: network_options.SwarmKeyFile = None,
    host: network_options.Host = None,
    port: network_options.Port = 0,
    identity: network_options.IdentityFile = None,
    announce: network_options.Announce = None,
    serve_relay: network_options.ServeRelay = None,
    upnp: network_options.Upnp = False,
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
    peers = options.peers_of(initial_peers)
    network = network_of(
        initial_peers=peers,
        host=host,
        port=port,
        announce=announce,
        serve_relay=serve_relay,
        upnp=upnp,
        swarm_key=swarm_key,
        is_new=not peers,
    )
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
            key = "" if network.swarm_key is None else " --swarm-key FILE"
            print(f"  shoal serve MODEL --initial-peers {node.transport.addresses[0]}{key}\n", flush=True)
            await asyncio.Event().wait()
