"""Options that say where a peer listens, how others reach it and who hears of it, and the `NetworkConfig` from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.terminal.console import as_usage

if TYPE_CHECKING:
    from shoal.net import NetworkConfig

Host = Annotated[
    str | None,
    typer.Option(
        metavar="IP",
        help="Listen at this address only; 127.0.0.1 is for this machine. Default: all, with IPv4 and IPv6.",
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="The TCP port; 0 lets the system choose.")]
IdentityFile = Annotated[
    Path | None,
    typer.Option("--identity", metavar="FILE", help="The key that is the peer id. Default: one kept for this machine."),
]
Announce = Annotated[
    list[str] | None,
    typer.Option(metavar="ADDRESS", help="Where others reach this machine, if not at its own addresses."),
]
Relay = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADDRESS",
        help="A peer that carries our streams when others cannot dial us. Default: found among members.",
    ),
]
ServeRelay = Annotated[
    bool | None,
    typer.Option(
        "--serve-relay/--no-serve-relay",
        help="Carry connections to members that others cannot dial. Default: if this machine has a public address.",
        show_default=False,
    ),
]
Upnp = Annotated[
    bool,
    typer.Option(
        "--upnp/--no-upnp", help="Have the router of this network open a port to this machine. Needs miniupnpc."
    ),
]
OnLan = Annotated[
    bool | None,
    typer.Option(
        "--lan/--no-lan",
        help="Announce the swarm on the local network: `shoal join` lists it there. Default: if it is a swarm of that "
        "network.",
    ),
]


def network_of(
    *,
    initial_peers: tuple[str, ...] = (),
    host: str | None = None,
    port: int = 0,
    announce: list[str] | None = None,
    relay: list[str] | None = None,
    serve_relay: bool | None = None,
    upnp: bool = False,
    client_mode: bool = False,
) -> NetworkConfig:
    """How a command joins a swarm, by its options. Imports nothing slow. Raises `WrongUsage` for a bad address."""
    from shoal.net import NetworkConfig, check_addresses

    network = NetworkConfig(
        initial_peers=initial_peers,
        host=host,
        port=port,
        announce=tuple(announce or ()),
        relays=tuple(relay or ()),
        serve_relay=serve_relay,
        upnp=upnp,
        client_mode=client_mode,
    )
    with as_usage():
        check_addresses(network)
    return network
