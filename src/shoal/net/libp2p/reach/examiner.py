"""Dials other peers back, so that they learn whether they can be dialled; and asks others to do so."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import Callable, Iterator, Sequence

from shoal.concurrency import now
from shoal.net.addressing.addresses import host_of, is_public, peer_of
from shoal.net.addressing.own_addresses import is_outside, own_networks
from shoal.net.bandwidth import digest_of
from shoal.net.libp2p.daemon import Daemon, DaemonFailed
from shoal.net.libp2p.libp2p_stream import Libp2pStream
from shoal.net.libp2p.reach.prober import Prober
from shoal.net.transport import Stream, StreamBroken
from shoal.net.wire import codec
from shoal.policy.network.reachability import DialAllowance, DialReport
from shoal.protocol import (
    MAX_ADDRESS,
    MAX_DIALED_ADDRESSES,
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
RESOLVE_SECONDS = 2.0
ANSWER_SECONDS = 12.0
"""How long a peer waits for an answer. Dialling takes five seconds if routers swallow what is sent."""


class Examiner:
    """Answers the streams of `REACH_PROTOCOL`. `relays` says whether this peer carries the streams of others now."""

    def __init__(self, prober: Prober, *, relays: Callable[[], bool], clock: Callable[[], float] = time.time) -> None:
        self._prober = prober
        self._relays = relays
        self._clock = clock
        self._allowance = DialAllowance()
        self._own: set[str] = set()  # peers that are this one in disguise, to try its relays

    async def close(self) -> None:
        """End what it dials with."""
        await self._prober.close()

    @contextlib.contextmanager
    def expecting(self, peer: str) -> Iterator[None]:
        """Take a `Filler` from this peer while the context lasts: from no other one."""
        self._own.add(peer)
        try:
            yield
        finally:
            self._own.discard(peer)

    async def __call__(self, stream: Stream) -> None:
        """Answer the one request of a stream."""
        kinds = {"filler"} if stream.peer in self._own else {"dial_back"}
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                message, tensors = await codec.receive(stream, kinds)
                match message:
                    case DialBack():
                        await codec.send(stream, await self._dialed_back(stream, message))
                    case Filler() if "filler" in tensors:
                        await codec.send(stream, Filler(digest=digest_of(tensors["filler"])))
                    case _:
                        await codec.send(stream, Failure(code="rejected", reason="no such request here"))
        except (ProtocolViolation, TimeoutError) as failure:
            logger.debug("%s asked to be dialled: %s", stream.peer, failure or "it takes too long")

    async def _dialed_back(self, stream: Stream, request: DialBack) -> DialedBack | Failure:
        if any(peer_of(address) != stream.peer or "/p2p-circuit" in address for address in request.addresses):
            return Failure(code="rejected", reason="addresses of other peers")
        allowance = self._allowance.grant(stream.peer, now=now())
        if allowance is None:
            return Failure(code="busy", reason="too many requests to be dialled", retry_after=60.0)
        self._allowance = allowance
        checked = [await addresses_to_dial(each, seen_at=stream.address) for each in request.addresses]
        dialled = [address for each in checked for address in each]
        try:
            reached = dict(zip(dialled, await self._prober.reached(stream.peer, dialled), strict=True))
        except (DaemonFailed, TimeoutError):
            return Failure(code="busy", reason="this peer cannot dial at the moment", retry_after=60.0)
        return DialedBack(
            reached=tuple(any(reached[address] for address in each) for each in checked),
            seen_at=stream.address,
            clock=self._clock(),
            relays=self._relays(),
        )


async def addresses_to_dial(address: str, *, seen_at: str | None) -> tuple[str, ...]:
    """What to dial for an address of a peer that is seen at another one: nothing if it may not have that dialled.

    A private one may be dialled only for a peer that is seen in a private network itself, and one of this machine only
    for one that is on it. Otherwise strangers could find out by the answers which ports are open in this machine's
    network. A name is looked up once, here: the IP addresses that were checked are dialled, at most one of each
    version.
    """
    _, kind, host, *rest = address.split("/")
    try:
        if kind in ("ip4", "ip6"):
            found = [ipaddress.ip_address(host)]
        else:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(RESOLVE_SECONDS):
                found = [ipaddress.ip_address(each[4][0]) for each in await loop.getaddrinfo(host, None)]
    except (OSError, ValueError, TimeoutError):
        return ()
    seen = host_of(seen_at)
    if seen is not None and not seen.is_global:
        allowed = seen.is_loopback or not any(each.is_loopback for each in found)
    else:
        allowed = all(each.is_global for each in found)
    if not allowed:
        return ()
    versions = {
        each.version: each for each in reversed(found) if kind in ("dns", f"ip{each.version}", f"dns{each.version}")
    }
    return tuple("/".join(("", f"ip{version}", str(each), *rest)) for version, each in versions.items())


async def examined_by(
    examiner: str, daemon: Daemon, addresses: Sequence[str], *, clock: Callable[[], float] = time.time
) -> DialReport | None:
    """What the peer `examiner`, to which the daemon is connected, finds when it dials this peer's own addresses.

    `None` if it does not answer, or does not examine now.
    """
    usable = [each for each in addresses if len(each) <= MAX_ADDRESS]
    asked = tuple(sorted(usable, key=lambda each: not is_public(each))[:MAX_DIALED_ADDRESSES])
    if not asked:
        return None
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
        is_outside=where is not None and is_outside(where, own_networks()),
        seen_at=answer.seen_at,
        clock_ahead=answer.clock - clock(),
        offers_relay=answer.relays,
    )
