"""Finds out which peers answer at addresses, when only hosts and ports are known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from shoal.concurrency import owned_task
from shoal.errors import SwarmError
from shoal.net.identity import Identity
from shoal.net.libp2p.daemon import Daemon, DaemonConfig, DaemonFailed

logger = logging.getLogger(__name__)

DIAL_SECONDS = 8.0
"""How long an answer may take, by default; all addresses are dialled at once."""
OTHERS_SECONDS, OTHERS_TIMES = 2.0, 3
"""Once a peer has answered: how long others may take at least, and how many times as long as the first one took."""


@asynccontextmanager
async def stranger(identity: Identity | None = None) -> AsyncIterator[Daemon]:
    """A daemon with this identity or one of its own, which only dials, and makes no relayed connection direct.

    Raises `DaemonFailed`, and `TimeoutError`.
    """
    daemon = await Daemon.start(identity or Identity.temporary(), DaemonConfig(punches_holes=False))
    try:
        yield daemon
    finally:
        await daemon.stop()


async def peers_at(
    addresses: Sequence[str], *, seconds: float = DIAL_SECONDS, waits_for_all: bool = False
) -> tuple[str, ...]:
    """What is `answering` at these addresses. Raises `SwarmError` if the daemon does not start."""
    async with AsyncExitStack() as stack:
        try:
            daemon = await stack.enter_async_context(stranger())
        except (DaemonFailed, TimeoutError) as failure:
            raise SwarmError(f"the network could not be started: {failure or 'it does not answer'}") from None
        return await answering(daemon.peer_at, addresses, seconds=seconds, waits_for_all=waits_for_all)


async def answering(
    peer_at: Callable[[str], Coroutine[Any, Any, str]],
    addresses: Sequence[str],
    *,
    seconds: float,
    waits_for_all: bool = False,
) -> tuple[str, ...]:
    """The addresses with the ids of the peers that answer there in time: one dead way in does not keep a user waiting.

    In time is within `seconds`. Unless it `waits_for_all`, once one has answered, others have `OTHERS_TIMES` times as
    long as that one took, but no less than `OTHERS_SECONDS`.
    """
    clock = asyncio.get_running_loop().time
    began, until = clock(), clock() + seconds
    async with AsyncExitStack() as stack:
        dials = [await stack.enter_async_context(owned_task(peer_at(address))) for address in addresses]
        waiting = set(dials)
        while waiting and (left := until - clock()) > 0:
            ended, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not waits_for_all and any(each.exception() is None for each in ended):
                until = min(until, began + max(OTHERS_SECONDS, OTHERS_TIMES * (clock() - began)))
        found = []
        for address, dial in zip(addresses, dials, strict=True):
            try:
                if not dial.done():
                    raise TimeoutError
                found.append(f"{address}/p2p/{dial.result()}")
            except (DaemonFailed, TimeoutError) as failure:
                logger.info("no peer answers at %s: %s", address, str(failure) or "it takes too long")
        return tuple(found)
