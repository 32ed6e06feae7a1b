"""Finds out which peers answer at addresses, when only hosts and ports are known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from shoal.errors import SwarmError
from shoal.net.identity import Identity
from shoal.net.libp2p.daemon import Daemon, DaemonConfig, DaemonFailed

logger = logging.getLogger(__name__)

DIAL_SECONDS = 8.0
"""How long an answer may take; all addresses are dialled at once."""


async def peers_at(addresses: Sequence[str]) -> tuple[str, ...]:
    """The addresses with the ids of the peers that answer there. Raises `SwarmError` if the daemon does not start."""
    try:
        daemon = await Daemon.start(Identity.temporary(), DaemonConfig())
    except (DaemonFailed, TimeoutError) as failure:
        raise SwarmError(f"the network could not be started: {failure or 'it does not answer'}") from None

    async def dial(address: str) -> str | None:
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                return f"{address}/p2p/{await daemon.peer_at(address)}"
        except (DaemonFailed, TimeoutError) as failure:
            logger.info("no peer answers at %s: %s", address, failure or "it takes too long")
            return None

    try:
        found = await asyncio.gather(*map(dial, addresses))
        return tuple(address for address in found if address is not None)
    finally:
        await daemon.stop()
