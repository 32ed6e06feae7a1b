"""Dials peers as a stranger would: with another identity, and from ports from which they have heard nothing.

The daemon of a peer cannot tell whether another one can be dialled: it is connected to it already, and routers let
answers in to the port that a peer has sent something to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from shoal.concurrency import now
from shoal.net.bandwidth import digest_of, random_bytes
from shoal.net.libp2p.daemon import Daemon, DaemonFailed, DaemonGone
from shoal.net.libp2p.libp2p_stream import Libp2pStream
from shoal.net.libp2p.strangers import stranger
from shoal.net.transport import StreamBroken
from shoal.net.wire import codec
from shoal.protocol import REACH_PROTOCOL, Filler, ProtocolViolation

logger = logging.getLogger(__name__)

DIAL_SECONDS = 5.0
"""How long an address may take to answer. One that needs longer is too far away to be useful."""
CARRY_SECONDS = 20.0
"""How long a relay may take for the bytes below: 64 KiB a second."""
CARRIED_BYTES = 1 << 20
"""What a relay has to carry before it is trusted."""
IDLE_SECONDS = 60.0
"""How long the daemon stays after it was needed."""


class Prober:
    """Dials addresses by a daemon of its own, which starts when it is needed and ends when it is not. `close` it."""

    def __init__(self) -> None:
        self._started: asyncio.Future[Daemon] | None = None  # while it lives
        self._life: asyncio.Task[None] | None = None
        self._num_users = 0
        self._used = asyncio.Event()

    async def reached(self, peer: str, addresses: Sequence[str]) -> list[bool]:
        """For each of these addresses, whether this peer answers there and proves its id.

        Raises `DaemonFailed` and `TimeoutError` if the daemon does not start.
        """

        async def dial(daemon: Daemon, address: str) -> bool:
            try:
                async with asyncio.timeout(DIAL_SECONDS):
                    return await daemon.peer_at(address.removesuffix(f"/p2p/{peer}")) == peer
            except DaemonGone:  # which says nothing of the peer
                raise
            except (DaemonFailed, TimeoutError) as failure:
                logger.debug("%s does not answer at %s: %s", peer, address, failure or "it takes too long")
                return False

        async with self._running() as daemon:
            return list(await asyncio.gather(*(dial(daemon, address) for address in addresses)))

    async def close(self) -> None:
        """End the daemon."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[Daemon]:
        """The daemon, while the context lasts at least."""
        self._num_users += 1
        try:
            if self._started is None:
                self._started = asyncio.get_running_loop().create_future()
                self._started.add_done_callback(lambda started: started.exception())  # also if nothing waits for it
                self._life = asyncio.create_task(self._live(self._started), name="shoal-prober")
            yield await asyncio.shield(self._started)
        finally:
            self._num_users -= 1
            self._used.set()

    async def _live(self, started: asyncio.Future[Daemon]) -> None:
        """Run the daemon until it was not used for a while, or has died."""
        failure: Exception = DaemonFailed("the daemon that dials is ended")
        try:
            async with stranger() as daemon:
                started.set_result(daemon)
                while self._num_users or await self._is_used_again(daemon):
                    await self._used.wait()
                    self._used.clear()
                self._started = None  # the next user gets another daemon
        except (DaemonFailed, TimeoutError) as error:
            failure = error
        finally:
            if self._started is started:
                self._started = None
            if not started.done():
                started.set_exception(failure)

    async def _is_used_again(self, daemon: Daemon) -> bool:
        """Whether the daemon is used within `IDLE_SECONDS`, and can be."""
        self._used.clear()
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                await self._used.wait()
        except TimeoutError:
            return False
        return not daemon.closed.is_set()


async def seconds_to_carry(peer: str, relayed_address: str) -> float | None:
    """How long a megabyte takes to this peer, which answers `REACH_PROTOCOL`, at an address through a relay.

    `None` if it does not come through.
    """
    try:
        async with stranger() as daemon, asyncio.timeout(CARRY_SECONDS):
            await daemon.connect(peer, (relayed_address,))
            address, reader, writer = await daemon.open(peer, REACH_PROTOCOL)
            stream = Libp2pStream(peer, reader, writer, address=address)
            try:
                filler = random_bytes(CARRIED_BYTES)
                began = now()
                await codec.send(stream, Filler(), {"filler": filler})
                answer, _ = await codec.receive(stream, {"filler"})
                is_whole = isinstance(answer, Filler) and answer.digest == digest_of(filler)
                return now() - began if is_whole else None
            finally:
                await stream.close()
    except (DaemonFailed, StreamBroken, ProtocolViolation, TimeoutError) as failure:
        logger.debug("nothing comes through %s: %s", relayed_address, failure or "it takes too long")
        return None
