"""Starts a daemon that relays, and sees to it that it carries more than libp2p's 128 KiB for a connection.

The daemon makes two relays when it starts: one with its own, large limits, and one with libp2p's. Which of them answers
is decided by a race, usually the right one if the daemon has one thread. Nothing but a reservation shows which it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from shoal.net.identity import Identity
from shoal.net.libp2p.daemon import Daemon, DaemonConfig, DaemonFailed
from shoal.net.libp2p.reach.reservations import NotReserved, reserve
from shoal.net.libp2p.strangers import stranger
from shoal.policy.network.reachability import MIN_RELAYED_BYTES

logger = logging.getLogger(__name__)

MAX_STARTS = 8
"""After this many starts with the small limits, the daemon is used as it is: other peers will not relay by it."""
_LOOPBACK = {"/ip4/0.0.0.0/": "/ip4/127.0.0.1/", "/ip6/::/": "/ip6/::1/"}


async def start_daemon(identity: Identity, config: DaemonConfig) -> Daemon:
    """Start a daemon; one that relays is started again until it carries enough. Raises `DaemonFailed`."""
    daemon = await Daemon.start(identity, config)
    if not config.serve_relay or config.is_behind_nat:
        return daemon
    try:
        async with stranger() as other:
            for _ in range(MAX_STARTS - 1):
                if await _carries_enough(daemon, config, identity.peer, seen_by=other):
                    return daemon
                logger.debug("the libp2p daemon relays with libp2p's own limits; starting it again")
                await daemon.stop()
                daemon = await Daemon.start(identity, config)
            if not await _carries_enough(daemon, config, identity.peer, seen_by=other):
                logger.warning("this machine relays too little for others: the libp2p daemon keeps its small limits")
    except BaseException:
        await daemon.stop()
        raise
    return daemon


async def _carries_enough(daemon: Daemon, config: DaemonConfig, peer: str, *, seen_by: Daemon) -> bool:
    """Whether a place at this relay is of use. One that cannot be asked counts as one: that may not be its fault."""
    addresses = [*_on_this_machine(config.listen), *await daemon.addresses()]
    try:
        found = await reserve(seen_by, peer, addresses)
    except (NotReserved, DaemonFailed) as failure:
        logger.debug("the relay of this machine could not be asked: %s", failure)
        return True
    return found is None or found >= MIN_RELAYED_BYTES


def _on_this_machine(listen: Iterable[str]) -> list[str]:
    """Where a daemon is dialled from its own machine; what it announces may not lead back to it."""
    fixed = [address for address in listen if not address.endswith("/0")]
    for wildcard, loopback in _LOOPBACK.items():
        fixed = [address.replace(wildcard, loopback) for address in fixed]
    return fixed
