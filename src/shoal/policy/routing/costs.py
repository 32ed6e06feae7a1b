"""What a step costs on its way through the swarm, in seconds: the one place where servers and links are priced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal.peers import ServerInfo, short
from shoal.spans import Span

UNKNOWN_ROUND_TRIP = 0.15
"""Seconds assumed for a round trip that was never measured (PETALS, arXiv 2312.08361)."""
HOP_OVERHEAD = 0.002
"""Seconds that a hop costs beyond its network and its computing: framing, a thread's wake-up."""
NO_ROOM = 10.0
"""Seconds that a server costs whose cache has less room than is needed: better another one, or two (PETALS)."""
RELAYED = 0.05
"""Seconds that a server costs which only relays reach: they are shared, and their limits are not ours to know."""
SLOWEST = 1e-3
"""Tokens per second of a server that announces none: usable if there is nobody else."""
OTHER_DTYPE = 1.05
"""A server that computes in another dtype than the client counts for so much slower: among equals, the same one."""


@dataclass(frozen=True)
class Needs:
    """What is asked of a route.

    A step has `step_tokens` tokens, over all sequences. Before the first of `num_steps` steps each server computes
    `prompt_tokens` (a prompt, or the past that a server in place of another is given), which is spread over them. Its
    cache has to have room for `needed_tokens`: all of all sequences, and none for single passes.

    In a `ring`, a step goes from server to server and comes back from the last; otherwise each server answers the
    client. With a `head`, the last server computes the output head too. `dtype` is what the client computes in.
    """

    step_tokens: int = 1
    prompt_tokens: int = 0
    num_steps: int = 1
    needed_tokens: int = 0
    ring: bool = True
    head: bool = False
    dtype: str | None = None


@dataclass(frozen=True)
class Measured:
    """What a client knows by itself.

    The `round_trips` are its own, in seconds by peer id. The `slowness` of a server is by how much more time it takes
    than it announces. Servers are `apart` of which the first cannot reach the second: the client then carries what the
    one sends to the other. `under_way` are the seconds of computing that this client has given to a server and that it
    has not finished.
    """

    round_trips: Mapping[str, float] = field(default_factory=dict)
    slowness: Mapping[str, float] = field(default_factory=dict)
    apart: frozenset[tuple[str, str]] = frozenset()
    under_way: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hop:
    """A span on one server."""

    server: ServerInfo
    span: Span


@dataclass(frozen=True)
class HopCost:
    """The seconds that a hop adds to a step: the way to it, computing, waiting for others, and what is against it."""

    network: float
    compute: float
    queue: float
    handicap: float

    @property
    def seconds(self) -> float:
        return self.network + self.compute + self.queue + self.handicap


def announced_seconds(server: ServerInfo, num_blocks: int, num_tokens: int) -> float:
    """How long so many tokens take in so many of a server's blocks, by its own word."""
    decode, prefill = max(server.decode_speed or 0.0, SLOWEST), max(server.prefill_speed or 0.0, SLOWEST)
    return max(1 / decode, num_tokens / prefill) * num_blocks / len(server.span)


class Costs:
    """The prices of one picture of the swarm. `None` in place of a server is the client."""

    def __init__(self, servers: Iterable[ServerInfo], needs: Needs, known: Measured) -> None:
        self.needs = needs
        self.known = known
        self.unknown = UNKNOWN_ROUND_TRIP / 2 if needs.ring else float("inf")
        """What a link costs at most of which nothing is known, unless the client is too near to one of its ends."""
        self.near: dict[str, dict[str, float]] = {}
        """By receiver and sender, the links of which something is known."""
        if needs.ring:
            self._learn({server.peer: server for server in servers})

    def _learn(self, servers: Mapping[str, ServerInfo]) -> None:
        """Of two that disagree, whoever says that it is farther is believed: nobody alone makes a link look short."""
        names = {short(peer): peer for peer in servers}
        self.near = {peer: {} for peer in servers}
        for peer, server in servers.items():
            links = self.near[peer]
            for name, round_trip in server.round_trips:
                other, seconds = names.get(name), round_trip / 2
                if other is not None and other != peer and seconds > links.get(other, 0.0):
                    links[other] = self.near[other][peer] = seconds
        for sender, receiver in self.known.apart:
            if sender in servers and receiver in servers:
                through_client = self.leave(servers[sender]) + self.reach(servers[receiver])
                self.near[receiver][sender] = through_client

    def block(self, server: ServerInfo) -> float:
        """Computing one of its blocks."""
        needs = self.needs
        seconds = announced_seconds(server, 1, needs.step_tokens)
        if needs.prompt_tokens:
            seconds += announced_seconds(server, 1, needs.prompt_tokens) / max(needs.num_steps, 1)
        if needs.dtype is not None and server.dtype != needs.dtype:
            seconds *= OTHER_DTYPE
        return seconds * self.known.slowness.get(server.peer, 1.0)

    def queue(self, server: ServerInfo) -> float:
        """Waiting for others: each of those that wait costs about a step, and our own work what it costs."""
        step = 1 / max(server.decode_speed or 0.0, SLOWEST)
        return server.queue_length * step + self.known.under_way.get(server.peer, 0.0)

    def handicap(self, server: ServerInfo) -> float:
        """What is against using it."""
        no_room = NO_ROOM if server.cache_tokens_left < self.needs.needed_tokens else 0.0
        return no_room + (RELAYED if server.is_relayed else 0.0)

    def entry(self, server: ServerInfo) -> float:
        """All that entering it costs, but for the way to it."""
        return HOP_OVERHEAD + self.queue(server) + self.handicap(server)

    def reach(self, server: ServerInfo) -> float:
        """The way from the client; and back, where every server answers the client."""
        round_trip = self.known.round_trips.get(server.peer, UNKNOWN_ROUND_TRIP)
        return round_trip / 2 if self.needs.ring else round_trip

    def leave(self, server: ServerInfo) -> float:
        """The way to the client, where only the last server answers it."""
        return self.reach(server) if self.needs.ring else 0.0

    def link(self, sender: ServerInfo | None, receiver: ServerInfo | None) -> float:
        """The way from one to the other."""
        if sender is None:
            return 0.0 if receiver is None else self.reach(receiver)
        if receiver is None:
            return self.leave(sender)
        links = self.near.get(receiver.peer, {})
        if sender.peer in links:
            return links[sender.peer]
        # Two that are both near to us are near to each other; one that is near and one that is far are not.
        there, here = self.leave(sender), self.reach(receiver)
        return max(min(self.unknown, there + here), abs(there - here))

    def hop(self, hop: Hop, sender: ServerInfo | None) -> HopCost:
        """All that a hop costs behind another one."""
        return HopCost(
            network=self.link(sender, hop.server) + HOP_OVERHEAD,
            compute=self.block(hop.server) * len(hop.span),
            queue=self.queue(hop.server),
            handicap=self.handicap(hop.server),
        )
