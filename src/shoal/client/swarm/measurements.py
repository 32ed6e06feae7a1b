"""What a client has learned of servers by using them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from shoal.client.swarm.broken_pairs import BrokenPairs
from shoal.peers import ServerInfo
from shoal.policy.routing.belief import Ceiling, Fastest, ceiling
from shoal.policy.routing.costs import most_announced_seconds
from shoal.policy.routing.latency import Slowness, after_step, average_round_trip, seen_seconds
from shoal.policy.routing.route import Hop, Measured, Route, announced_seconds
from shoal.policy.routing.spread import WorkInFlight

FEW_TOKENS = 16
"""The inputs of more tokens may be long on their way, which is not the server's fault."""


class Measurements:
    """Moving averages of each server's round trip and slowness (`shoal.policy.routing.latency`), the pairs of servers
    that cannot push to one another, and the work that the client has given to each and that is not finished."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.broken_pairs = BrokenPairs(clock)
        self._clock = clock
        self._round_trips: dict[str, float] = {}
        self._slowness: dict[str, Slowness] = {}
        self._computed: set[str] = set()
        self._work_in_flight = WorkInFlight()
        self._fastest = Fastest()
        self._ceiling = Ceiling()

    def round_trips(self) -> Mapping[str, float]:
        """The round trips that were measured, in seconds, by peer id."""
        return self._round_trips

    def record_round_trip(self, peer: str, seconds: float) -> None:
        """A ping on an open stream was answered in `seconds`."""
        self._round_trips[peer] = average_round_trip(self._round_trips.get(peer), seconds)

    def record_answer(self, hop: Hop, num_tokens: int, said: float, *, waited: float | None) -> None:
        """A server says that a step took `said` seconds. The client has `waited` for it, if that is known."""
        peer, seconds = hop.server.peer, said
        if waited is not None and (round_trip := self._round_trips.get(peer)) is not None:
            self.record_speed(len(hop.span), num_tokens, max(said, waited - round_trip))
            if num_tokens <= FEW_TOKENS:
                seconds = seen_seconds(said, waited=waited, round_trip=round_trip)
        least = announced_seconds(hop.server, len(hop.span), num_tokens)
        most = most_announced_seconds(hop.server, len(hop.span), num_tokens)
        self.record_step(peer, min(max(least, seconds), most), seconds)

    def record_step(self, peer: str, predicted_seconds: float, seen_seconds: float) -> None:
        """A step took `seen_seconds` on a server that announces `predicted_seconds` for it."""
        slowness = after_step(self._slowness.get(peer), predicted_seconds, seen_seconds, now=self._clock())
        if slowness is not None:
            self._slowness[peer] = slowness

    def record_speed(self, num_blocks: int, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` tokens in `num_blocks` blocks took `seconds`, by this client's clock too."""
        self._fastest = self._fastest.after(num_blocks, num_tokens, seconds)

    def believe(self, answered: Sequence[ServerInfo]) -> None:
        """From now on, speeds are believed up to a ceiling (`shoal.policy.routing.belief`); these servers answered."""
        self._ceiling = ceiling(self._fastest, answered)

    def record_computed(self, peer: str) -> None:
        """A server has computed something whose time tells nothing: a token of a trial, or a single pass."""
        self._computed.add(peer)

    def is_confirmed(self, peer: str) -> bool:
        """Whether a server has computed anything for this client."""
        return peer in self._slowness or peer in self._computed

    def slowness(self, peer: str) -> float:
        """By what factor a server takes longer than it announces; 1 if it was never measured."""
        known = self._slowness.get(peer)
        return 1.0 if known is None else known.factor(self._clock())

    def excess_seconds(self, hop: Hop, num_tokens: int) -> float:
        """The seconds by which a step of `num_tokens` takes longer on a hop than its server announces."""
        return announced_seconds(hop.server, len(hop.span), num_tokens) * (self.slowness(hop.server.peer) - 1)

    @contextlib.contextmanager
    def reserving(self, route: Route) -> Iterator[None]:
        """While this is open, one more pass is in flight on this route. Others take other servers if that is faster."""
        self._work_in_flight = self._work_in_flight.added(route)
        try:
            yield
        finally:
            self._work_in_flight = self._work_in_flight.removed(route)

    def measured(self) -> Measured:
        """A frozen copy of all that is known at this moment, for choosing and pricing routes."""
        return Measured(
            round_trips=dict(self._round_trips),
            slowness={peer: self.slowness(peer) for peer in self._slowness},
            broken_pairs=self.broken_pairs.now(),
            work_in_flight=self._work_in_flight.seconds,
            ceiling=self._ceiling,
        )
