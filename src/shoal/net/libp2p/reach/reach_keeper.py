"""Finds out how others reach this peer, and keeps places at relays while they cannot dial it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence

from shoal.concurrency import now
from shoal.net.addressing.addresses import group_by_peer
from shoal.net.addressing.own_addresses import is_outside, own_networks
from shoal.net.libp2p.daemon import Daemon, DaemonFailed
from shoal.net.libp2p.reach.examiner import Examiner, examined_by
from shoal.net.libp2p.reach.prober import Prober
from shoal.net.libp2p.reach.relay_places import AVOIDED_SECONDS, Places, RelayPlaces
from shoal.net.transport import RelayTrial
from shoal.policy.network.reachability import (
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
"""How often they are asked while it is not, or while some were never asked."""
RENEW_SECONDS = 20.0
"""How often a place at a relay is renewed. A relay that was restarted has forgotten it."""
CONNECT_SECONDS = 8.0


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
        self.examiner = Examiner(Prober(), relays=lambda: offers_relay and not self.is_behind_nat)
        self._peer = peer
        self._known = known
        self._own = own
        self._named = group_by_peer(named)
        self._relays = RelayPlaces(self.examiner, peer)
        self._daemon: Daemon | None = None
        self._reports: tuple[DialReport, ...] = ()
        self._asked_at: dict[str, float] = {}
        self._examine_at = 0.0
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._rng = random.Random(random.getrandbits(32))  # noqa: S311 - nothing secret

    @property
    def is_behind_nat(self) -> bool:
        """Whether others cannot dial this peer, as far as it is known."""
        return bool(self._named) or self.reach.kind in (Reachability.RELAYED, Reachability.UNREACHABLE)

    def attach(self, daemon: Daemon) -> None:
        """Use this daemon from now on. Relays have to be asked again for the places that the last one had."""
        self._daemon = daemon
        self._relays.forget_failures()
        self._wake.set()

    async def start(self, *, seconds: float) -> None:
        """Look again and again from now on. Returns when it has looked once, after these seconds at the latest."""
        looked = asyncio.Event()
        self._keeping = asyncio.create_task(self._keep(looked), name="shoal-reach")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await looked.wait()

    async def close(self) -> None:
        """End what was started here."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self.examiner.close()

    async def other_than(self, last: Reach) -> Reach:
        """How others reach this peer, as soon as that is not `last` any more."""
        while (self.reach.kind, self.reach.relayed) == (last.kind, last.relayed):
            await self._changed.wait()
        return self.reach

    async def examine(self) -> Reach:
        """Ask others to dial this peer."""
        self._examine_at = now() + UNSETTLED_SECONDS  # also if it fails: without a pause, it would fail again at once
        daemon, places, networks = self._daemon, self._known(), own_networks()
        assert daemon is not None
        known = {
            peer: any(is_outside(each, networks) for each in where)
            for peer, where in places.items()
            if peer != self._peer
        }
        chosen = choose_examiners(known, self._asked_at, self._rng)
        self._asked_at = {peer: at for peer, at in self._asked_at.items() if peer in known}
        self._asked_at |= dict.fromkeys(chosen, now())
        found = await asyncio.gather(*(self._report_of(daemon, peer, places[peer]) for peer in chosen))
        self._reports = latest((*self._reports, *(each for each in found if each is not None)))
        self._settle()
        is_settled = (
            self.reach.kind in (Reachability.DIRECT, Reachability.RELAYED) and known.keys() <= self._asked_at.keys()
        )
        if is_settled:
            self._examine_at = now() + SETTLED_SECONDS
        return self.reach

    async def try_relays(self) -> tuple[RelayTrial, ...]:
        """What relays do for this peer now: those that are named, else some of those that others offer to be."""
        assert self._daemon is not None
        return await self._relays.try_some(self._daemon, self._candidates())

    async def _keep(self, looked: asyncio.Event) -> None:
        while True:
            try:
                if not self._named and now() >= self._examine_at:
                    await self.examine()
                await self._keep_relays()
            except DaemonFailed as failure:  # the next daemon is attached soon
                logger.debug("the relays are not looked after: %s", failure)
            except Exception:  # a defect here must not leave a server with relays that are gone
                logger.exception("the relays are not looked after")
            looked.set()
            due = RENEW_SECONDS if self._relays.held or self._wants_relays() else self._examine_at - now()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(due, 0.0)):
                    await self._wake.wait()
            self._wake.clear()

    async def _report_of(self, daemon: Daemon, peer: str, where: Sequence[str]) -> DialReport | None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await daemon.connect(peer, where)
        except (DaemonFailed, TimeoutError):
            return None
        return await examined_by(peer, daemon, self._own())

    def _wants_relays(self) -> bool:
        return bool(self._named) or wants_relays(self._reports)

    async def _keep_relays(self) -> None:
        """Renew the places at relays, and reserve others, while others cannot dial this peer."""
        assert self._daemon is not None
        if self._wants_relays():
            wanted = max(len(self._named), WANTED_RELAYS)
            pause = 0.0 if self._named else AVOIDED_SECONDS
            async for _ in self._relays.keep(self._daemon, self._candidates(), wanted=wanted, pause=pause):
                self._settle()
        else:
            self._relays.held = {}
        self._settle()

    def _candidates(self) -> Places:
        """The relays that this peer may use, in the order in which to try them."""
        if self._named:
            return self._named
        places = self._known()
        offering = [report.examiner for report in self._reports if report.offers_relay and report.examiner in places]
        self._rng.shuffle(offering)
        return {peer: places[peer] for peer in offering}

    def _settle(self) -> None:
        before = self.reach
        self.reach = judged(
            self._reports,
            self._relays.addresses,
            has_named_relays=bool(self._named),
            refused=self._relays.refused,
        )
        if (before.kind, before.relayed) != (self.reach.kind, self.reach.relayed):
            self._changed.set()
            self._changed = asyncio.Event()
