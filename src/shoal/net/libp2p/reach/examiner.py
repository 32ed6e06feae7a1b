"""Dials other peers back, so that they learn whether they can be dialled; and asks others to do so."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from shoal.concurrency import now
from shoal.net.addressing.addresses import peer_of
from shoal.net.addressing.local_hosts import is_public_host
from shoal.net.bandwidth import digest_of
from shoal.net.libp2p.daemon import Daemon, DaemonFailed
from shoal.net.libp2p.libp2p_stream import Libp2pStream
from shoal.net.libp2p.reach.prober import Prober
from shoal.net.transport import Stream, StreamBroken
from shoal.net.wire import codec
from shoal.policy.network.reachability import DialAllowance, DialReport
from shoal.protocol import (
    MAX_DIALED_ADDRESSES,
    REACH_KINDS,
    REACH_PROTOCOL,
    DialBack,
    DialedBack,
    Failure,
    Filler,
    ProtocolViolation,
)

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 25.0
"""The longest that one stream may last: it has at most one request."""
ANSWER_SECONDS = 12.0
"""How long a peer waits for an answer. Dialling takes five seconds if routers swallow what is sent."""


class Examiner:
    """Answers the streams of `REACH_PROTOCOL`. `relays` says whether this peer carries the streams of others."""

    def __init__(self, prober: Prober, *, relays: bool, clock: Callable[[], float] = time.time) -> None:
        self._prober = prober
        self._relays = relays
        self._clock = clock
        self._allowance = DialAllowance()

    async def __call__(self, stream: Stream) -> None:
        """Answer the one request of a stream."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                message, tensors = await codec.receive(stream, REACH_KINDS)
                match message:
                    case DialBack():
                        await codec.send(stream, await self._dialed_back(stream, message))
                    case Filler() if "filler" in tensors and self._grants(stream.peer):
                        await codec.send(stream, Filler(digest=digest_of(tensors["filler"])))
                    case _:
                        await codec.send(stream, Failure(code="rejected", reason="no such request here"))
        except (ProtocolViolation, TimeoutError) as failure:
            logger.debug("%s asked to be dialled: %s", stream.peer, failure or "it takes too long")

    def _grants(self, peer: str) -> bool:
        allowance = self._allowance.grant(peer, now=now())
        self._allowance = allowance or self._allowance
        return allowance is not None

    async def _dialed_back(self, stream: Stream, request: DialBack) -> DialedBack | Failure:
        if any(peer_of(address) != stream.peer or "/p2p-circuit" in address for address in request.addresses):
            return Failure(code="rejected", reason="addresses of other peers")
        if not self._grants(stream.peer):
            return Failure(code="busy", reason="too many requests to be dialled", retry_after=60.0)
        try:
            reached = await self._prober.reached(stream.peer, request.addresses)
        except (DaemonFailed, TimeoutError):
            return Failure(code="busy", reason="this peer cannot dial at the moment", retry_after=60.0)
        return DialedBack(reached=tuple(reached), seen_at=stream.address, clock=self._clock(), relays=self._relays)


async def examined_by(
    examiner: str, daemon: Daemon, addresses: Sequence[str], *, clock: Callable[[], float] = time.time
) -> DialReport | None:
    """What the peer `examiner`, to which the daemon is connected, finds when it dials this peer's own addresses.

    `None` if it does not answer, or does not examine now.
    """
    asked = tuple(addresses[:MAX_DIALED_ADDRESSES])
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            where, reader, writer = await daemon.open(examiner, REACH_PROTOCOL)
            stream = Libp2pStream(examiner, reader, writer, address=where)
            try:
                await codec.send(stream, DialBack(addresses=asked))
                answer, _ = await codec.receive(stream, frozenset())
            finally:
                await stream.close()
    except (DaemonFailed, StreamBroken, ProtocolViolation, TimeoutError) as failure:
        logger.debug("%s does not dial this peer: %s", examiner, failure or "it does not answer")
        return None
    if not isinstance(answer, DialedBack) or len(answer.reached) != len(asked):
        logger.debug("%s does not dial this peer: %s", examiner, answer)
        return None
    return DialReport(
        examiner,
        now(),
        dialled=asked,
        reached=tuple(address for address, came in zip(asked, answer.reached, strict=True) if came),
        is_outside=where is not None and is_public(where),
        seen_at=answer.seen_at,
        clock_ahead=answer.clock - clock(),
        offers_relay=answer.relays,
    )


def is_public(address: str) -> bool:
    """Whether a multiaddress is a direct one, with a host that is known everywhere."""
    return "/p2p-circuit" not in address and is_public_host(address.split("/")[2])
