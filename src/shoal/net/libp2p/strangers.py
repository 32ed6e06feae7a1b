"""Finds out which peers answer at addresses, when only hosts and ports are known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from shoal.errors import SwarmError
from shoal.net.identity import Identity
from shoal.net.libp2p.daemon import Daemon, DaemonConfig, DaemonFailed

logger = logging.getLogger(__name__)

DIAL_SECONDS = 8.0
"""How long an answer may take, by default; all addresses are dialled at once."""


@asynccontextmanager
async def stranger() -> AsyncIterator[Daemon]:
    """A daemon with an identity of its own, which only dials, and makes no relayed connection direct.

    Raises `DaemonFailed`, and `TimeoutError`.
    """
    daemon = await Daemon.start(Identity.temporary(), DaemonConfig(punches_holes=False))
    try:
        yield daemon
    finally:
        await daemon.stop()


async def peers_at(addresses: Sequence[str], *, seconds: float = DIAL_SECONDS) -> tuple[str, ...]:
    """The addresses with the ids of the peers that answer there. Raises `SwarmError` if the daemon does not start."""

    async def dial(daemon: Daemon, address: str) -> str | None:
        try:
            async with asyncio.timeout(seconds):
                return f"{address}/p2p/{await daemon.peer_at(address)}"
        except (DaemonFailed, TimeoutError) as failure:
            logger.info("no peer answers at %s: %s", address, failure or "it takes too long")
            return None

    async with AsyncExitStack() as stack:
        try:
            daemon = await stack.enter_async_context(stranger())
        except (DaemonFailed, TimeoutError) as failure:
            raise SwarmError(f"the network could not be started: {failure or 'it does not answer'}") from None
        found = await asyncio.gather(*(dial(daemon, address) for address in addresses))
        return tuple(address for address in found if address is not None)
