"""How bytes travel: frames over libp2p, a directory of who serves what, and a network in memory for tests."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shoal.net.transport import Node

logger = logging.getLogger(__name__)

MIN_RELAYS = 4
"""With fewer to choose from, libp2p waits for more before it asks any of them to carry us."""


@dataclass(frozen=True)
class NetworkConfig:
    """How to take part in a swarm.

    `initial_peers`: addresses of peers to join by; none starts a swarm. `identity`: where the key is kept that is our
    peer id; None makes a new one that is forgotten. `port` 0 lets the system choose. `announce`: addresses that others
    shall use, when they are not those of this machine (`/ip4/203.0.113.5/tcp/31337`). `client_mode`: only dial, keep
    nothing for others. `relays`: peers, four or more, that carry our streams when nobody can dial us. `serve_relay`:
    be such a relay.
    """

    initial_peers: tuple[str, ...] = ()
    identity: Path | None = None
    host: str = "0.0.0.0"  # noqa: S104
    port: int = 0
    announce: tuple[str, ...] = ()
    client_mode: bool = False
    relays: tuple[str, ...] = ()
    serve_relay: bool = False


def check_addresses(config: NetworkConfig) -> None:
    """Raises `UserError` for an address that is none; imports nothing slow."""
    from shoal.net.addresses import check_announced, check_peers, listen_address

    check_peers(config.initial_peers)
    check_peers(config.relays)
    check_announced(config.announce)
    if not config.client_mode:
        listen_address(config.host, config.port)


@asynccontextmanager
async def join(config: NetworkConfig) -> AsyncIterator[Node]:
    """Take part in a swarm over the real network.

    Raises `UserError` for an address or an identity that is none, or an identity that another process has,
    `BootstrapFailed` if no initial peer answers, and `SwarmError` if the network cannot be started.
    """
    # hivemind takes seconds to import, and `shoal --help` does not need it; mistakes are told before that, too.
    from shoal.net.addresses import check_announced, check_peers, listen_address, peer_of
    from shoal.net.identity import Identity

    initial_peers, relays = check_peers(config.initial_peers), check_peers(config.relays)
    listen = () if config.client_mode and not relays else (listen_address(config.host, config.port),)
    if 0 < len({peer_of(relay) for relay in relays}) < MIN_RELAYS:
        logger.warning("with fewer than %d relays, this peer can be reached only after some minutes", MIN_RELAYS)
    announce = check_announced(config.announce)
    identity = Identity.at(config.identity) if config.identity is not None else Identity.temporary()

    from shoal.net.libp2p.daemon import DaemonConfig
    from shoal.net.libp2p.dht_directory import DhtDirectory
    from shoal.net.libp2p.libp2p_transport import Libp2pTransport
    from shoal.net.libp2p.twin import answers_elsewhere, only_here

    daemon = DaemonConfig(listen=listen, announce=announce, relays=relays, serve_relay=config.serve_relay)
    directory = DhtDirectory(identity, keeps_records=daemon.reachable, initial_peers=initial_peers)
    transport = Libp2pTransport(identity, daemon, initial_peers=initial_peers, attach=directory.attach)
    with nullcontext() if config.identity is None else only_here(identity.peer):
        await transport.start()
        try:
            yield Node(transport, directory, partial(answers_elsewhere, identity.peer))
        finally:
            # In this order: the daemon ends, whatever it still has to send, when the directory's connection does.
            await transport.close()
            await directory.close()
