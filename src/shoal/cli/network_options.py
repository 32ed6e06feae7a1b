"""Options that say where a peer listens, how others reach it and who hears of it, and the `NetworkConfig` from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.terminal.console import WrongUsage, as_usage
from shoal.net.swarm_key import SWARM_KEY, key_in

if TYPE_CHECKING:
    from shoal.net import NetworkConfig

_ADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/")
OwnServers = Annotated[
    list[str] | None,
    typer.Option(
        "--own-server",
        metavar="FILE",
        help="The identity of a server that you run elsewhere: those that it helped serve you first when there is a "
        "queue. none: tell no server which ones are yours. Default: those of this machine.",
    ),
]
SwarmKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--swarm-key",
        metavar="FILE",
        help=f"The key of a closed swarm, which lets no peer in without it. Default: ${SWARM_KEY}, else an open swarm.",
    ),
]
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
    swarm_key: str | Path | None = None,
    is_new: bool = False,
) -> NetworkConfig:
    """How a command joins a swarm, by its options. Imports nothing slow.

    A swarm that `is_new` gets a new key if the file of `swarm_key` is missing. Raises `WrongUsage` for a bad address or
    key.
    """
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
        return replace(network, swarm_key=key_in(swarm_key, create=is_new))


def key_beside_code(swarm_key: Path | None) -> str:
    """What `network_of` is given as the key where an invite code names the swarm: the code has it, if there is one.

    Raises `WrongUsage` if the user names a file too. What the environment names is for other swarms.
    """
    if swarm_key is not None:
        raise WrongUsage(
            "an invite code says itself whether its swarm is closed, and has the key", hint="leave out --swarm-key"
        )
    return ""


def spread_peers(arguments: Sequence[str]) -> list[str]:
    """Allow `--initial-peers A B C` for `--initial-peers A --initial-peers B --initial-peers C`."""
    spread: list[str] = []
    inside = False
    for index, argument in enumerate(arguments):
        previous = arguments[index - 1] if index else ""
        if inside and previous != "--initial-peers" and _ADDRESS.match(argument):
            spread.append("--initial-peers")
        elif previous != "--initial-peers":
            inside = argument.startswith("--initial-peers")
        spread.append(argument)
    return spread
