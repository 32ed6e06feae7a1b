"""The network: streams of frames over libp2p, the directory of servers, and a network in memory for tests.

It imports `shoal.policy.census` and `network`, `shoal.protocol` and below. It knows nothing of models, servers or
clients.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shoal.net.swarm_key import SwarmKey
from shoal.net.transport import Node

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkConfig:
    """How to join a swarm.

    `initial_peers`: multiaddresses of peers to join by; none starts a new swarm. `identity`: the file of the key behind
    the peer id; None makes a temporary key. `host`: the IP address to listen on; None is all of this machine's, with
    IPv4 and IPv6. `port`: 0 lets the system choose one. `announce`: the addresses that other peers use, where they
    differ from this machine's own (`/ip4/203.0.113.5/tcp/31337`). `client_mode`: only dial, and store no records.
    `relays`: multiaddresses of peers that relay the streams of a machine that cannot be dialled; without any, such a
    machine looks for them. `serve_relay`: be such a relay; None is yes for a machine with a public address. `upnp`:
    have the router lead a port to this machine. `swarm_key`: that of a closed swarm.
    """

    initial_peers: tuple[str, ...] = ()
    identity: Path | None = None
    host: str | None = None
    port: int = 0
    announce: tuple[str, ...] = ()
    client_mode: bool = False
    relays: tuple[str, ...] = ()
    serve_relay: bool | None = None
    upnp: bool = False
    swarm_key: SwarmKey | None = None


def check_addresses(config: NetworkConfig) -> None:
    """Raise `UserError` for a malformed address. Imports nothing slow."""
    from shoal.net.addressing.addresses import check_announced, check_peers, listen_addresses

    check_peers(config.initial_peers)
    check_peers(config.relays)
    check_announced(config.announce)
    if not config.client_mode:
        listen_addresses(config.host, config.port)
    if config.upnp:
        from shoal.net.port_mapping import check_library

        check_library()


async def find_peers(
    addresses: Sequence[str], *, seconds: float | None = None, waits_for_all: bool = False
) -> tuple[str, ...]:
    """The addresses with the ids of the peers that answer there; those where none does are left out.

    `seconds`: how long an answer may take; by default, as long as one from far away may need. Once one has come, others
    are waited for only a little longer, unless it `waits_for_all`. Raises `UserError` for a malformed address, and
    `SwarmError` if the network cannot be started.
    """
    from shoal.net.addressing.addresses import check_announced

    checked = check_announced(addresses)
    from shoal.net.libp2p.strangers import DIAL_SECONDS, peers_at

    seconds = DIAL_SECONDS if seconds is None else seconds
    return await peers_at(checked, seconds=seconds, waits_for_all=waits_for_all)


def import_network() -> None:
    """Import what `join` needs. This takes a second, during which an event loop would do nothing else."""
    from shoal.net.libp2p.duplicate_identity import answers_elsewhere  # noqa: F401
    from shoal.net.libp2p.hash_table.dht_directory import DhtDirectory  # noqa: F401
    from shoal.net.libp2p.libp2p_transport import Libp2pTransport  # noqa: F401


@asynccontextmanager
async def join(config: NetworkConfig) -> AsyncIterator[Node]:
    """Join a swarm over the real network, and leave it at the end of the context.

    Raises `UserError` for a malformed address or identity file, and for an identity that another process uses;
    `BootstrapFailed` if no initial peer answers; `SwarmError` if the network cannot be started.
    """
    # hivemind takes a second to import, so the arguments are checked before.
    from shoal.net.addressing.addresses import check_announced, check_peers
    from shoal.net.identity import Identity

    initial_peers, relays = check_peers(config.initial_peers), check_peers(config.relays)
    is_dialled = not config.client_mode or bool(relays)
    announce = check_announced(config.announce)
    identity = Identity.load_or_create(config.identity) if config.identity is not None else Identity.temporary()

    from shoal.net.addressing.own_addresses import any_port, free_addresses, has_public_address, places_of
    from shoal.net.libp2p.daemon import DaemonConfig
    from shoal.net.libp2p.duplicate_identity import answers_elsewhere
    from shoal.net.libp2p.hash_table.dht_directory import DhtDirectory
    from shoal.net.libp2p.identity_lock import identity_lock
    from shoal.net.libp2p.libp2p_transport import Libp2pTransport
    from shoal.net.port_mapping import mapped_port

    port = config.port or (any_port() if config.upnp else 0)
    listen = await asyncio.to_thread(free_addresses, config.host, port) if is_dialled else ()
    serve_relay = config.serve_relay
    if serve_relay is None:
        serve_relay = not relays and has_public_address(listen, announce)
    is_mapped = config.upnp and is_dialled
    async with mapped_port(port, interface=config.host) if is_mapped else nullcontext() as mapping:
        if mapping is not None:  # what is announced replaces what the daemon would announce
            announce = (*(announce or places_of(listen)), mapping.address)
        daemon = DaemonConfig(listen=listen, announce=announce, serve_relay=serve_relay)
        directory = DhtDirectory(
            identity,
            stores_records=bool(listen) and not relays,
            initial_peers=initial_peers,
            swarm_key=config.swarm_key,
        )
        transport = Libp2pTransport(
            identity,
            daemon,
            initial_peers=initial_peers,
            relays=relays,
            attach=directory.attach,
            swarm_key=config.swarm_key,
        )
        with nullcontext() if config.identity is None else identity_lock(identity.peer):
            await transport.start()
            try:
                yield Node(transport, directory, partial(answers_elsewhere, identity.peer), transport.try_relays)
            finally:
                # In this order: the daemon ends, even if it has data to send, when the directory's connection to it
                # ends.
                await transport.close()
                await directory.close()
