"""A simulated swarm: servers on two continents, their announcements, and the time of steps through them."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shoal.peers import MAX_NEIGHBORS, ServerInfo, ServerState
from shoal.policy.nearest import may_be_next
from shoal.policy.placement.petals import choose_span
from shoal.policy.routing.route import Hop, Measured
from shoal.policy.view import SwarmView
from shoal.spans import Span

OCEAN = 0.09
"""Seconds that a round trip between the continents adds. Within a continent it takes 2 to 30 ms."""
PREFILL = 30
"""How many tokens of a prompt a server computes in the time of one decoded token (`docs/performance.md`)."""


@dataclass(frozen=True)
class Place:
    """A place on one of two continents."""

    continent: int
    x: float
    y: float

    @classmethod
    def anywhere(cls, chance: random.Random) -> Place:
        return cls(chance.randrange(2), chance.random(), chance.random())

    def round_trip(self, other: Place) -> float:
        near = 0.002 + 0.02 * math.hypot(self.x - other.x, self.y - other.y)
        return near + (OCEAN if self.continent != other.continent else 0.0)


@dataclass(frozen=True)
class Simulated:
    """A swarm, and the place of each server."""

    view: SwarmView
    places: dict[str, Place]

    @classmethod
    def of(cls, num_servers: int, num_blocks: int, *, seed: int) -> Simulated:
        """Servers join one after another where the swarm is weakest, and announce their nearest neighbors."""
        chance = random.Random(seed)
        places = {f"server{index:06d}": Place.anywhere(chance) for index in range(num_servers)}
        throughput, servers = [0.0] * num_blocks, list[ServerInfo]()
        for peer in places:
            largest = max(2, num_blocks // 4)
            span = choose_span(throughput, num_blocks=chance.randint(max(1, largest // 4), largest))
            speed = chance.lognormvariate(math.log(400), 0.7) / len(span)  # the median is 400 tokens/s for one block
            for block in span:
                throughput[block] += speed
            servers.append(_server(peer, span, speed))
        known = [replace(server, round_trips=tuple(_nearest(server, servers, places))) for server in servers]
        return cls(SwarmView(num_blocks, tuple(known)), places)

    def measured_from(self, place: Place) -> Measured:
        """The round trips that a client there has measured."""
        return Measured({peer: place.round_trip(other) for peer, other in self.places.items()})

    def step_seconds(self, hops: Sequence[Hop], client: Place) -> float:
        """Seconds of a step on a route without other clients."""
        stops = [client, *(self.places[hop.server.peer] for hop in hops), client]
        network = sum(one.round_trip(other) / 2 for one, other in itertools.pairwise(stops))
        return network + sum(pass_seconds(hop, 1) for hop in hops)


def _server(peer: str, span: Span, speed: float) -> ServerInfo:
    return ServerInfo(
        peer=peer,
        span=span,
        state=ServerState.ONLINE,
        fingerprint="",
        decode_speed=speed,
        prefill_speed=speed * PREFILL,
        cache_tokens_left=1 << 20,
        dtype="bfloat16",
        quantization="none",
        version="",
    )


def _nearest(server: ServerInfo, servers: Sequence[ServerInfo], places: dict[str, Place]) -> list[tuple[str, float]]:
    here = places[server.peer]
    found = [(other.peer[-12:], here.round_trip(places[other.peer])) for other in servers if may_be_next(server, other)]
    return sorted(found, key=lambda each: each[1])[:MAX_NEIGHBORS]


def pass_seconds(hop: Hop, num_tokens: int) -> float:
    """Seconds of a pass with one token of each of `num_tokens` sessions."""
    server = hop.server
    return max(1 / server.decode_speed, num_tokens / server.prefill_speed) * len(hop.span) / len(server.span)


@dataclass
class Traffic:
    """Clients that decode without a pause, simulated event by event.

    A server computes all waiting clients in one pass.
    """

    swarm: Simulated
    clients: list[tuple[Place, tuple[Hop, ...]]] = field(default_factory=list)

    def run(self, seconds: float) -> tuple[float, list[float], Counter[str]]:
        """Tokens per second of all clients, the seconds of each step, and the mean queue length of each server."""
        waiting: dict[str, list[tuple[int, int]]] = {}
        busy: set[str] = set()
        began = [0.0] * len(self.clients)
        steps: list[float] = []
        queued: Counter[str] = Counter()
        order = itertools.count()
        events: list[tuple[float, int, str, list[tuple[int, int]]]] = []

        def travel(now: float, client: int, hop: int) -> None:
            """Send a step to the next server, or back to the client."""
            place, hops = self.clients[client]
            one = self.swarm.places[hops[hop - 1].server.peer] if hop else place
            other = self.swarm.places[hops[hop].server.peer] if hop < len(hops) else place
            heapq.heappush(events, (now + one.round_trip(other) / 2, next(order), "arrive", [(client, hop)]))

        def begin(now: float, peer: str) -> None:
            batch = waiting.pop(peer)
            busy.add(peer)
            longest = max((self.clients[client][1][hop] for client, hop in batch), key=lambda hop: len(hop.span))
            took = pass_seconds(longest, len(batch))
            heapq.heappush(events, (now + took, next(order), "done", batch))

        for client in range(len(self.clients)):
            travel(0.0, client, 0)
        while events and events[0][0] < seconds:
            now, _, kind, members = heapq.heappop(events)
            if kind == "done":
                peer = self.clients[members[0][0]][1][members[0][1]].server.peer
                busy.discard(peer)
                for client, hop in members:
                    travel(now, client, hop + 1)
                if peer in waiting:
                    begin(now, peer)
                continue
            ((client, hop),) = members
            hops = self.clients[client][1]
            if hop == len(hops):
                steps.append(now - began[client])
                began[client] = now
                travel(now, client, 0)
                continue
            peer = hops[hop].server.peer
            queued[peer] += len(waiting.get(peer, ()))
            waiting.setdefault(peer, []).append((client, hop))
            if peer not in busy:
                begin(now, peer)
        passes = Counter(hop.server.peer for _, hops in self.clients for hop in hops)
        per_arrival = max(1.0, len(steps) / max(1, len(self.clients)))
        average = Counter({peer: round(total / (passes[peer] * per_arrival)) for peer, total in queued.items()})
        return len(steps) / seconds, steps, average
