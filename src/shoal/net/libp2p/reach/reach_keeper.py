"""Finds out how others reach this peer, and keeps places at relays while they cannot dial it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence

from shoal.concurrency import now
from shoal.net.addresses import peer_of
from shoal.net.libp2p.daemon import Daemon, DaemonFailed
from shoal.net.libp2p.reach.examiner import Examiner, examined_by, is_public
from shoal.net.libp2p.reach.prober import Prober, seconds_to_carry
from shoal.net.libp2p.reach.reservations import NotReserved, Reservation, reserve
from shoal.net.transport import RelayTrial
from shoal.policy.reachability import (
    MIN_RELAYED_BYTES,
    WANTED_RELAYS,
    DialReport,
    Reach,
    Reachability,
    choose_examiners,
    judged,
    latest,
    wants_relays,
)

logger = logging.getLogger(__name__)

SETTLED_SECONDS = 300.0
"""How often others are asked to dial this peer once it is known how they reach it."""
UNSETTLED_SECONDS = 30.0
"""How often they are asked while it is not."""
RENEW_SECONDS = 20.0
"""How often a place at a relay is renewed. A relay that was restarted has forgotten it."""
AVOIDED_SECONDS = 120.0
"""How long a relay is not tried again that gave no place, or carried nothing."""
CONNECT_SECONDS = 8.0
MOST_TRIED = 4
"""The relays that are tried for a diagnosis."""

Places = Mapping[str, Sequence[str]]
"""Peers that may examine this one, and their addresses."""


class ReachKeeper:
    """The one writer of how others reach this peer. `attach` it to each daemon that is started, and `close` it.

    `known` names the peers that may be asked, `own` this peer's direct addresses. The relays that are `named` take the
    place of those that are found. `examiner` answers the streams of others that ask to be dialled.
    """

    def __init__(
        self,
        peer: str,
        *,
        known: Callable[[], Places],
        own: Callable[[], Sequence[str]],
        named: Sequence[str] = (),
        offers_relay: bool = False,
    ) -> None:
        self.reach = Reach()
        self._prober = Prober()
        self.examiner = Examiner(self._prober, relays=offers_relay)
        self._peer = peer
        self._known = known
        self._own = own
        self._named = tuple(named)
        self._daemon: Daemon | None = None
        self._held: dict[str, Reservation] = {}  # by the address of the relay
        self._avoided: dict[str, float] = {}  # until when, by the address of the relay
        self._reports: tuple[DialReport, ...] = ()
        self._examine_at = 0.0
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._rng = random.Random(random.getrandbits(32))  # noqa: S311 - nothing secret

    def attach(self, daemon: Daemon) -> None:
        """Use this daemon from now on. It has no places yet."""
        self._daemon = daemon
        self._wake.set()

    def start(self) -> None:
        """Look again and again from now on."""
        self._keeping = asyncio.create_task(self._keep(), name="shoal-reach")

    async def close(self) -> None:
        """End what was started here."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self._prober.close()

    async def other_than(self, last: Reach) -> Reach:
        """How others reach this peer, as soon as that is not `last` any more."""
        while (self.reach.kind, self.reach.relayed) == (last.kind, last.relayed):
            await self._changed.wait()
        return self.reach

    async def _keep(self) -> None:
        while True:
            due = RENEW_SECONDS if self._held or self._wants_relays() else UNSETTLED_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due):
                    await self._wake.wait()
            self._wake.clear()
            if not self._named and now() >= self._examine_at:
                await self.examine()
            await self.keep_relays()

    async def examine(self) -> Reach:
        """Ask others to dial this peer."""
        daemon, places = self._daemon, self._known()
        assert daemon is not None
        outside = {peer: any(map(is_public, where)) for peer, where in places.items() if peer != self._peer}
        chosen = choose_examiners(outside, self._reports, self._rng)
        found = await asyncio.gather(*(self._report_of(daemon, peer, places[peer]) for peer in chosen))
        self._reports = latest((*self._reports, *(each for each in found if each is not None)), now=now())
        self._settle()
        has_asked_all = outside.keys() <= {report.examiner for report in self._reports}
        is_settled = self.reach.kind in (Reachability.DIRECT, Reachability.RELAYED) and has_asked_all
        self._examine_at = now() + (SETTLED_SECONDS if is_settled else UNSETTLED_SECONDS)
        return self.reach

    async def _report_of(self, daemon: Daemon, peer: str, where: Sequence[str]) -> DialReport | None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await daemon.connect(peer, where)
        except (DaemonFailed, TimeoutError):
            return None
        return await examined_by(peer, daemon, self._own())

    async def keep_relays(self) -> Reach:
        """Renew the places at relays, and reserve others, while others cannot dial this peer."""
        daemon = self._daemon
        assert daemon is not None
        if not self._wants_relays():
            self._held.clear()
            self._settle()
            return self.reach
        await asyncio.gather(*(self._renew(daemon, relay) for relay in [*self._held]))
        missing = max(len(self._named), WANTED_RELAYS) - len(self._held)
        chosen = [relay for relay in self._candidates() if now() >= self._avoided.get(relay, 0.0)][:missing]
        await asyncio.gather(*(self._reserve(daemon, relay) for relay in chosen))
        self._settle()
        return self.reach

    def _wants_relays(self) -> bool:
        return wants_relays(self.reach, has_named_relays=bool(self._named))

    def _candidates(self) -> list[str]:
        """Addresses of relays that are not held, in the order in which to try them."""
        if self._named:
            found = [*self._named]
        else:
            places = self._known()
            offering = [report.examiner for report in self._reports if report.offers_relay]
            direct = ([each for each in places.get(peer, ()) if "/p2p-circuit" not in each] for peer in offering)
            found = [min(where, key=lambda each: not is_public(each)) for where in direct if where]
            self._rng.shuffle(found)
        held = {peer_of(relay) for relay in self._held}
        return [relay for relay in found if peer_of(relay) not in held]

    async def _renew(self, daemon: Daemon, relay: str) -> None:
        try:
            self._held[relay] = await reserve(daemon, relay)
        except NotReserved as reason:
            logger.warning("the relay %s is lost: %s", relay, reason)
            del self._held[relay]

    async def trials(self) -> tuple[RelayTrial, ...]:
        """What relays do for this peer now: those that are named, else some of those that others offer to be."""
        daemon = self._daemon
        assert daemon is not None

        async def attempt(relay: str) -> RelayTrial:
            try:
                _, seconds = await self._tried(daemon, relay)
            except NotReserved as reason:
                return RelayTrial(relay, None, str(reason))
            return RelayTrial(relay, seconds)

        return tuple(await asyncio.gather(*map(attempt, [*self._held, *self._candidates()][:MOST_TRIED])))

    async def _tried(self, daemon: Daemon, relay: str) -> tuple[Reservation, float]:
        """A place at a relay, and the seconds that a megabyte took through it. Raises `NotReserved`."""
        reservation = await reserve(daemon, relay)
        if reservation.max_bytes is not None and reservation.max_bytes < MIN_RELAYED_BYTES:
            raise NotReserved(f"it carries {reservation.max_bytes:,} bytes only")
        seconds = await seconds_to_carry(self._peer, reservation.address_of(self._peer))
        if seconds is None:
            raise NotReserved("a megabyte did not come through")
        return reservation, seconds

    async def _reserve(self, daemon: Daemon, relay: str) -> None:
        try:
            reservation, _ = await self._tried(daemon, relay)
        except NotReserved as reason:
            level = logging.WARNING if relay in self._named and relay not in self._avoided else logging.DEBUG
            logger.log(level, "the relay %s is not used: %s", relay, reason)
            self._avoided[relay] = now() + (0.0 if self._named else AVOIDED_SECONDS)
        else:
            self._avoided.pop(relay, None)
            self._held[relay] = reservation

    def _settle(self) -> None:
        relayed = sorted(each.address_of(self._peer) for each in self._held.values())
        before, self.reach = self.reach, judged(self._reports, relayed, has_named_relays=bool(self._named))
        if (before.kind, before.relayed) != (self.reach.kind, self.reach.relayed):
            self._changed.set()
            self._changed = asyncio.Event()
