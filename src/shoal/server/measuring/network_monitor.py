"""How many tokens per second a server's network carries: measured with neighbors, corrected by what sessions show."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

from shoal.concurrency import background
from shoal.net.bandwidth import measure_bandwidth
from shoal.net.transport import Transport
from shoal.peers import ServerInfo
from shoal.policy.network.network_speed import Direction, NetworkEstimate, Seen
from shoal.server.measuring.metering import Meter

log = logging.getLogger(__name__)

MAX_PARTNERS = 3
"""The servers that help to measure the network: one alone may be slow, or far."""
IDLE_CHECK_SECONDS = 1.0
"""How often the server looks whether its sessions leave the network alone for a moment."""
MAX_IDLE_CHECKS = 30
"""A network that is never left alone is measured all the same."""
RETRY_SECONDS = 1.0
"""How often the server looks for a partner if it knows none."""
NOTICEABLE = 1.25
"""A speed that has changed by this factor is announced at once."""


class NetworkMonitor:
    """Keeps an estimate of a server's network while `measuring()` is entered.

    A token has `token_bytes` bytes on the wire. `partners` are the servers that could help to measure, best first.
    `on_change` is called when the speed has changed by much. An earlier `estimate` may be taken over.
    """

    def __init__(
        self,
        transport: Transport,
        meter: Meter,
        *,
        token_bytes: int,
        partners: Callable[[], Sequence[ServerInfo]],
        on_change: Callable[[], None] = lambda: None,
        estimate: NetworkEstimate | None = None,
    ) -> None:
        self._transport = transport
        self._meter = meter
        self._token_bytes = token_bytes
        self._partners = partners
        self._on_change = on_change
        self.estimate = estimate or NetworkEstimate()
        self._news = asyncio.Event()

    @property
    def speed(self) -> float | None:
        """Tokens per second in the slower direction; `None` while it is unknown."""
        return self.estimate.tokens_per_second(self._token_bytes)

    @contextlib.asynccontextmanager
    async def measuring(self) -> AsyncIterator[None]:
        """Measure when it is due, and learn from what sessions send, until the context is left."""
        self._meter.on_seen = self._learn
        try:
            async with background(self._measure_when_due(), name="shoal-network"):
                yield
        finally:
            self._meter.on_seen = lambda direction, seen: None

    async def _measure_when_due(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            self._news.clear()
            if (wait := self.estimate.due - clock()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._news.wait()
            elif partners := self._partners()[:MAX_PARTNERS]:
                await self._until_idle()
                await self._measure(partners)
            else:
                await asyncio.sleep(RETRY_SECONDS)

    async def _until_idle(self) -> None:
        for _ in range(MAX_IDLE_CHECKS):
            if self._meter.is_idle:
                return
            await asyncio.sleep(IDLE_CHECK_SECONDS)

    async def _measure(self, partners: Sequence[ServerInfo]) -> None:
        found = [await measure_bandwidth(self._transport, each.peer, each.addresses) for each in partners]
        self._set(self.estimate.after_measuring(found, now=asyncio.get_running_loop().time()))
        up, down = self.estimate.up, self.estimate.down
        log.info("the network: %s up, %s down, by %d servers", _shown(up), _shown(down), len(partners))

    def _learn(self, direction: Direction, seen: Seen) -> None:
        self._set(self.estimate.after_traffic(direction, seen, now=asyncio.get_running_loop().time()))
        self._news.set()

    def _set(self, estimate: NetworkEstimate) -> None:
        before = self.speed
        self.estimate = estimate
        now = self.speed
        if now is not None and (before is None or not before / NOTICEABLE < now < before * NOTICEABLE):
            self._on_change()


def _shown(rate: float | None) -> str:
    return "unknown" if rate is None else f"{rate * 8 / 1e6:.3g} Mbit/s"


def in_order(servers: Sequence[ServerInfo], *, zone: str) -> list[ServerInfo]:
    """Servers that are given nearest first, those first that tell most about the network.

    Servers in other zones are reached by the way out, which limits a server; relays may be slower than the network.
    """
    return sorted(servers, key=lambda server: (bool(zone) and server.zone == zone, server.is_relayed))
