"""A simulated swarm: servers on two continents, their announcements, and the time of steps through them."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shoal.peers import MAX_NEIGHBORS, Capacity, ServerInfo, ServerState
from shoal.policy.machines.machine import Machine
from shoal.policy.nearest import may_be_next
from shoal.policy.placement.joining import Rule, choose_blocks
from shoal.policy.placement.plan import plan_moves
from shoal.policy.routing.route import Hop, Measured
from shoal.policy.view import SwarmView
from shoal.simulator.world.places import Place

PREFILL = 30
"""How many tokens of a prompt a server computes in the time of one decoded token (`docs/performance.md`)."""
READING = 0.9
"""The part of a decoding step that reading the weights takes: 8 sessions take 1.6 times as long as one, 32 sessions 3.9
times (measured on two cores, `docs/performance.md`)."""
SATURATED_ROWS = 32
"""The sessions of the passes in which servers measure the speed that they announce as their capacity."""
MAX_PLANS = 20


@dataclass(frozen=True)
class Simulated:
    """A swarm, the machines that it is made of, and the place of each server."""

    view: SwarmView
    machines: tuple[Machine, ...]
    places: dict[str, Place]

    @classmethod
    def of(cls, num_servers: int, num_blocks: int, *, seed: int, rule: Rule = "petals") -> Simulated:
        """Servers join one after another by a rule, and announce their nearest neighbors.

        With the rule "graded" they then move as the shared plan says, until it has no moves.
        """
        chance = random.Random(seed)
        places = {f"server{index:06d}": Place.anywhere(chance) for index in range(num_servers)}
        machines = list[Machine]()
        for peer in places:
            largest = max(2, num_blocks // 4)
            most = chance.randint(max(1, largest // 4), largest)
            speed = chance.lognormvariate(math.log(400), 0.7)  # the median is 400 tokens/s for one block
            machine = Machine(peer, None, most, ((1, speed * saturated_gain()),))
            span = choose_blocks(machine, machines, num_blocks, rule=rule, rng=chance).span
            machines.append(replace(machine, span=span))
        if rule == "graded":
            machines = _settled(machines, num_blocks)
        servers = [_server(machine) for machine in machines]
        known = [replace(server, round_trips=tuple(_nearest(server, servers, places))) for server in servers]
        return cls(SwarmView(num_blocks, tuple(known)), tuple(machines), places)

    def measured_from(self, place: Place) -> Measured:
        """The round trips that a client there has measured."""
        return Measured({peer: place.round_trip(other) for peer, other in self.places.items()})

    def step_seconds(self, hops: Sequence[Hop], client: Place) -> float:
        """Seconds of a step on a route without other clients."""
        stops = [client, *(self.places[hop.server.peer] for hop in hops), client]
        network = sum(one.round_trip(other) / 2 for one, other in itertools.pairwise(stops))
        return network + sum(pass_seconds([hop]) for hop in hops)


def _settled(machines: list[Machine], num_blocks: int) -> list[Machine]:
    for _ in range(MAX_PLANS):
        moves = {move.peer: move.after for move in plan_moves(machines, num_blocks, now=0.0)}
        if not moves:
            break
        machines = [replace(each, span=moves.get(each.peer, each.span)) for each in machines]
    return machines


def _server(machine: Machine) -> ServerInfo:
    assert machine.span is not None
    speed = machine.block_speed(len(machine.span)) / saturated_gain() / len(machine.span)
    return ServerInfo(
        peer=machine.peer,
        span=machine.span,
        state=ServerState.ONLINE,
        fingerprint="",
        decode_speed=speed,
        prefill_speed=speed * PREFILL,
        cache_tokens_left=1 << 20,
        dtype="bfloat16",
        quantization="none",
        version="",
        capacity=Capacity(machine.max_blocks, machine.block_speeds, None, 1.0, 1.0),
    )


def _nearest(server: ServerInfo, servers: Sequence[ServerInfo], places: dict[str, Place]) -> list[tuple[str, float]]:
    here = places[server.peer]
    found = [(other.peer[-12:], here.round_trip(places[other.peer])) for other in servers if may_be_next(server, other)]
    return sorted(found, key=lambda each: each[1])[:MAX_NEIGHBORS]


def rows_seconds(num_rows: int) -> float:
    """How long a block takes for one token of each of `num_rows` sessions, in units of the time for one session."""
    return READING + (1 - READING) * num_rows


def saturated_gain() -> float:
    """How many times as many tokens as with one session a server computes in passes of `SATURATED_ROWS` sessions."""
    return SATURATED_ROWS / rows_seconds(SATURATED_ROWS)


def pass_seconds(hops: Sequence[Hop]) -> float:
    """Seconds of a pass of one server with one token of a session for each of these hops.

    A server computes a pass in segments: each block takes only the rows of the sessions that use it.
    """
    server = hops[0].server
    rows = Counter(block for hop in hops for block in hop.span)
    one_block = 1 / ((server.decode_speed or 1.0) * len(server.span))
    return one_block * sum(rows_seconds(number) for number in rows.values())


@dataclass
class Traffic:
    """Clients that decode without a pause, simulated event by event.

    A server computes all waiting clients in one pass.
    """

    swarm: Simulated
    clients: list[tuple[Place, tuple[Hop, ...]]] = field(default_factory=list)

    def run(self, seconds: float) -> tuple[float, list[float], Counter[str]]:
        """Tokens per second of all clients, the seconds of each step, and the queue of each server at the end.

        The first quarter of the time, in which the clients begin, does not count.
        """
        waiting: dict[str, list[tuple[int, int]]] = {}
        computing: dict[str, int] = {}
        began = [0.0] * len(self.clients)
        steps: list[float] = []
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
            computing[peer] = len(batch)
            took = pass_seconds([self.clients[client][1][hop] for client, hop in batch])
            heapq.heappush(events, (now + took, next(order), "done", batch))

        for client in range(len(self.clients)):
            travel(0.0, client, 0)
        while events and events[0][0] < seconds:
            now, _, kind, members = heapq.heappop(events)
            if kind == "done":
                peer = self.clients[members[0][0]][1][members[0][1]].server.peer
                del computing[peer]
                for client, hop in members:
                    travel(now, client, hop + 1)
                if peer in waiting:
                    begin(now, peer)
                continue
            ((client, hop),) = members
            hops = self.clients[client][1]
            if hop == len(hops):
                if now >= seconds / 4:
                    steps.append(now - began[client])
                began[client] = now
                travel(now, client, 0)
                continue
            peer = hops[hop].server.peer
            waiting.setdefault(peer, []).append((client, hop))
            if peer not in computing:
                begin(now, peer)
        queues = Counter(computing)
        queues.update({peer: len(here) for peer, here in waiting.items()})
        return len(steps) / (0.75 * seconds), steps, queues
