"""The places of a peer at relays: reserved, tried with a megabyte, renewed."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shoal.concurrency import now
from shoal.net.addressing.addresses import is_public
from shoal.net.identity import Identity
from shoal.net.libp2p.daemon import Daemon
from shoal.net.libp2p.reach.examiner import Examiner
from shoal.net.libp2p.reach.prober import seconds_to_carry
from shoal.net.libp2p.reach.reservations import NotReserved, reserve
from shoal.net.transport import RelayTrial
from shoal.policy.network.reachability import MIN_RELAYED_BYTES

logger = logging.getLogger(__name__)

MISSES = 3
"""A place counts as lost after this many renewals in turn that failed."""
TRUSTED_SECONDS = 3600.0
"""How long an address that carried a megabyte is not tried again."""
AVOIDED_SECONDS = 120.0
"""How long a relay is not asked again that gave no place, or carried nothing."""
MOST_TRIED = 4
"""The relays that are tried for a diagnosis."""

Places = Mapping[str, Sequence[str]]
"""Peers, and their addresses."""


@dataclass(frozen=True)
class Place:
    """A place at a relay: the relay's addresses that carry to this peer, and the renewals that failed in turn."""

    addresses: tuple[str, ...]
    misses: int = 0


class RelayPlaces:
    """The places of one peer, `held` by the peer ids of the relays. `examiner` answers what it sends itself."""

    def __init__(self, examiner: Examiner, peer: str) -> None:
        self.held: dict[str, Place] = {}
        self._examiner = examiner
        self._peer = peer
        self._avoided: dict[str, tuple[float, str]] = {}  # until when, and why, by the relay's peer id
        self._trusted: dict[str, float] = {}  # until when, by the address of the relay

    @property
    def addresses(self) -> tuple[str, ...]:
        """The peer's addresses at the relays that it has."""
        return tuple(sorted(self._through(each) for place in self.held.values() for each in place.addresses))

    @property
    def refused(self) -> tuple[str, ...]:
        """Why relays are not used."""
        return tuple(why for _, why in self._avoided.values())

    def forget_failures(self) -> None:
        """Ask all relays again."""
        self._avoided = {}

    async def keep(self, daemon: Daemon, candidates: Places, *, wanted: int, pause: float) -> AsyncIterator[None]:
        """Renew the places, and reserve others at these relays until there are as many as `wanted`.

        Yields after each change. One relay is tried at a time, because all tries share this machine's way out. A relay
        that is not used is asked again after `pause` seconds. Raises `DaemonGone`.
        """
        for relay in [*self.held]:
            await self._renew(daemon, relay)
            yield
        for relay, addresses in candidates.items():
            if len(self.held) >= wanted:
                break
            until, _ = self._avoided.get(relay, (0.0, ""))
            if relay not in self.held and now() >= until:
                await self._take(daemon, relay, addresses, pause=pause)
                yield

    async def try_some(self, daemon: Daemon, candidates: Places) -> tuple[RelayTrial, ...]:
        """What some of these relays do now, one after the other. Raises `DaemonGone`."""
        trials = []
        for relay, addresses in [*candidates.items()][:MOST_TRIED]:
            chosen = worth_trying(addresses)
            try:
                await self._reserve(daemon, relay, chosen)
                seconds = [await self._seconds(each) for each in chosen]
            except NotReserved as reason:
                trials.append(RelayTrial(chosen[0], None, str(reason)))
                continue
            best = min((each for each in seconds if each is not None), default=None)
            trials.append(RelayTrial(chosen[0], best, "" if best is not None else NOTHING_CAME))
        return tuple(trials)

    async def _renew(self, daemon: Daemon, relay: str) -> None:
        place = self.held[relay]
        try:
            await reserve(daemon, relay, place.addresses)
        except NotReserved as reason:
            if place.misses + 1 < MISSES:
                self.held[relay] = replace(place, misses=place.misses + 1)
                return
            logger.warning("the relay %s is lost: %s", _name(place.addresses[0]), reason)
            del self.held[relay]
        else:
            self.held[relay] = replace(place, misses=0)

    async def _take(self, daemon: Daemon, relay: str, addresses: Sequence[str], *, pause: float) -> None:
        chosen = worth_trying(addresses)
        try:
            if not chosen:
                raise NotReserved("it has no address")
            await self._reserve(daemon, relay, chosen)
            carrying = tuple([each for each in chosen if await self._carries(each)])
            if not carrying:
                raise NotReserved(NOTHING_CAME)
        except NotReserved as reason:
            level = logging.DEBUG if relay in self._avoided else logging.INFO
            why = f"{_name(chosen[0]) if chosen else relay}: {reason}"
            logger.log(level, "a relay is not used: %s", why)
            self._avoided[relay] = (now() + pause, why)
        else:
            self._avoided.pop(relay, None)
            self.held[relay] = Place(carrying)

    async def _reserve(self, daemon: Daemon, relay: str, addresses: Sequence[str]) -> None:
        """Raises `NotReserved`, also for a relay that carries too little."""
        max_bytes = await reserve(daemon, relay, addresses)
        if max_bytes is not None and max_bytes < MIN_RELAYED_BYTES:
            raise NotReserved(f"it carries {max_bytes:,} bytes only")

    async def _carries(self, address: str) -> bool:
        if now() >= self._trusted.get(address, 0.0):
            if await self._seconds(address) is None:
                return False
            self._trusted[address] = now() + TRUSTED_SECONDS
        return True

    async def _seconds(self, address: str) -> float | None:
        identity = Identity.temporary()
        with self._examiner.expecting(identity.peer):
            return await seconds_to_carry(self._peer, self._through(address), identity)

    def _through(self, address: str) -> str:
        return f"{address}/p2p-circuit/p2p/{self._peer}"


NOTHING_CAME = "a megabyte did not come through"


def worth_trying(addresses: Sequence[str]) -> list[str]:
    """Of a relay's addresses, one for each version of IP: public ones if it has any."""
    direct = [each for each in addresses if "/p2p-circuit" not in each]
    usable = [each for each in direct if is_public(each)] or direct
    return [*{each.split("/")[1]: each for each in reversed(usable)}.values()]


def _name(address: str) -> str:
    return address.split("/")[2]
