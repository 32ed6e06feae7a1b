"""What a step costs on a route, in seconds: the only module where servers and links are priced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal.peers import ServerInfo, short
from shoal.spans import Span

UNKNOWN_ROUND_TRIP = 0.15
"""Seconds assumed for a round trip that was never measured (PETALS, arXiv 2312.08361)."""
HOP_OVERHEAD = 0.002
"""Seconds that a hop costs beyond its network and its computing: framing, waking a thread."""
NO_ROOM = 10.0
"""Seconds added for a server whose cache is too small: more than any detour over one or two others (PETALS)."""
RELAYED = 0.05
"""Seconds added for a server that is reached through relays only: relays are shared, and their limits unknown."""
SLOWEST = 1e-3
"""Tokens per second of a server that announces no speed: it is used only where there is no other."""
OTHER_DTYPE = 1.05
"""The factor by which a server with another dtype than the client's counts as slower: it decides between equals."""


@dataclass(frozen=True)
class Needs:
    """What a route is needed for.

    A step has `step_tokens` tokens, over all sequences. Before the first of `num_steps` steps each server computes
    `prompt_tokens`: a prompt, or the replay on a server that replaces another. Their cost is spread over the steps. The
    cache of each server must have room for `needed_tokens`: those of all sequences of a session, and none for single
    passes.

    In a `ring`, a step goes from server to server, and only the last server answers the client. Otherwise each server
    answers the client. With a `head`, the last server computes the output head too. `dtype` is the client's.
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
    """What a client knows from its own measurements, all by peer id.

    `round_trips` are those between client and server, in seconds. `slowness` is the factor by which a server takes
    longer than it announces. In each of `broken_pairs` the first server cannot push to the second, so the client
    forwards between them. `work_in_flight` are the seconds of computing that the client has given a server and that the
    server has not finished.
    """

    round_trips: Mapping[str, float] = field(default_factory=dict)
    slowness: Mapping[str, float] = field(default_factory=dict)
    broken_pairs: frozenset[tuple[str, str]] = frozenset()
    work_in_flight: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hop:
    """One server of a route, and the span that it computes there."""

    server: ServerInfo
    span: Span


@dataclass(frozen=True)
class HopCost:
    """The seconds that a hop adds to a step.

    `network` is the link to the server, `queue` the wait for others, `handicap` what is added for its drawbacks.
    """

    network: float
    compute: float
    queue: float
    handicap: float

    @property
    def seconds(self) -> float:
        return self.network + self.compute + self.queue + self.handicap


def announced_seconds(server: ServerInfo, num_blocks: int, num_tokens: int) -> float:
    """The seconds that `num_tokens` take in `num_blocks` of a server's blocks, by the speeds that it announces."""
    decode, prefill = max(server.decode_speed or 0.0, SLOWEST), max(server.prefill_speed or 0.0, SLOWEST)
    return max(1 / decode, num_tokens / prefill) * num_blocks / len(server.span)


class Costs:
    """The prices of one view of the swarm, in seconds. `None` in place of a server means the client."""

    def __init__(self, servers: Iterable[ServerInfo], needs: Needs, known: Measured) -> None:
        self.needs = needs
        self.known = known
        self.unknown_link = UNKNOWN_ROUND_TRIP / 2 if needs.ring else float("inf")
        """The most that a link costs of which nothing is known, except if one of its ends is near the client."""
        self.known_links: dict[str, dict[str, float]] = {}
        """By receiver and sender, the links that were measured or are broken."""
        if needs.ring:
            self._add_links({server.peer: server for server in servers})

    def _add_links(self, servers: Mapping[str, ServerInfo]) -> None:
        """If the two servers of a link disagree, the longer time counts: one server alone cannot make a link short."""
        names = {short(peer): peer for peer in servers}
        self.known_links = {peer: {} for peer in servers}
        for peer, server in servers.items():
            links = self.known_links[peer]
            for name, round_trip in server.round_trips:
                other, seconds = names.get(name), round_trip / 2
                if other is not None and other != peer and seconds > links.get(other, 0.0):
                    links[other] = self.known_links[other][peer] = seconds
        for sender, receiver in self.known.broken_pairs:
            if sender in servers and receiver in servers:
                through_client = self.leave(servers[sender]) + self.reach(servers[receiver])
                self.known_links[receiver][sender] = through_client

    def block(self, server: ServerInfo) -> float:
        """The cost of computing one of the server's blocks."""
        needs = self.needs
        seconds = announced_seconds(server, 1, needs.step_tokens)
        if needs.prompt_tokens:
            seconds += announced_seconds(server, 1, needs.prompt_tokens) / max(needs.num_steps, 1)
        if needs.dtype is not None and server.dtype != needs.dtype:
            seconds *= OTHER_DTYPE
        return seconds * self.known.slowness.get(server.peer, 1.0)

    def queue(self, server: ServerInfo) -> float:
        """The wait for others: about a step for each in the server's queue, and this client's own work in flight."""
        step = 1 / max(server.decode_speed or 0.0, SLOWEST)
        return server.queue_length * step + self.known.work_in_flight.get(server.peer, 0.0)

    def waiting(self, server: ServerInfo) -> float:
        """The same, as a number of requests."""
        return self.queue(server) * max(server.decode_speed or 0.0, SLOWEST)

    def no_room(self, server: ServerInfo) -> float:
        """What is added for a cache without room."""
        return NO_ROOM if server.cache_tokens_left < self.needs.needed_tokens else 0.0

    def handicap(self, server: ServerInfo) -> float:
        """What is added for the server's drawbacks: a cache without room, relays."""
        return self.no_room(server) + (RELAYED if server.is_relayed else 0.0)

    def entry(self, server: ServerInfo) -> float:
        """All that entering the server costs, without the link to it."""
        return HOP_OVERHEAD + self.queue(server) + self.handicap(server)

    def reach(self, server: ServerInfo) -> float:
        """The way from the client to the server; and back, where every server answers the client."""
        round_trip = self.known.round_trips.get(server.peer, UNKNOWN_ROUND_TRIP)
        return round_trip / 2 if self.needs.ring else round_trip

    def leave(self, server: ServerInfo) -> float:
        """The way from the last server to the client; 0 where every server answers the client (see `reach`)."""
        return self.reach(server) if self.needs.ring else 0.0

    def link(self, sender: ServerInfo | None, receiver: ServerInfo | None) -> float:
        """The way from one server to another, or from or to the client."""
        if sender is None:
            return 0.0 if receiver is None else self.reach(receiver)
        if receiver is None:
            return self.leave(sender)
        links = self.known_links.get(receiver.peer, {})
        if sender.peer in links:
            return links[sender.peer]
        # Two servers that are both near the client are near each other; a near one and a far one are not.
        there, here = self.leave(sender), self.reach(receiver)
        return max(min(self.unknown_link, there + here), abs(there - here))

    def hop(self, hop: Hop, sender: ServerInfo | None) -> HopCost:
        """All that a hop costs after `sender`."""
        return HopCost(
            network=self.link(sender, hop.server) + HOP_OVERHEAD,
            compute=self.block(hop.server) * len(hop.span),
            queue=self.queue(hop.server),
            handicap=self.handicap(hop.server),
        )
