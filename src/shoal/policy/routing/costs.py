"""What a step costs on a route, in seconds: the only module where servers and links are priced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from shoal.peers import ServerInfo, block_speed_at, short
from shoal.policy.routing.belief import MOST_GAIN, Ceiling
from shoal.spans import Span

_Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

ROWS_AT_ONCE = 64
"""The senders whose links are computed in one operation: few, so that intermediate results stay in the cache."""
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

    Steps of a `session` keep a cache on the servers. Otherwise the step is a single pass, as training makes it. Both go
    from server to server, and from the last one to the client. With a `head`, the last server computes the output head
    too. `dtype` is the client's.
    """

    step_tokens: int = 1
    prompt_tokens: int = 0
    num_steps: int = 1
    needed_tokens: int = 0
    session: bool = True
    head: bool = False
    dtype: str | None = None


@dataclass(frozen=True)
class Measured:
    """What a client knows from its own measurements, all by peer id.

    `round_trips` are those between client and server, in seconds. `slowness` is the factor by which a server takes
    longer than it announces. In each of `broken_pairs` the first server cannot push to the second, so the client
    forwards between them. `work_in_flight` are the seconds of computing that the client has given a server and that the
    server has not finished. No server is believed to be faster than the `ceiling`.
    """

    round_trips: Mapping[str, float] = field(default_factory=dict)
    slowness: Mapping[str, float] = field(default_factory=dict)
    broken_pairs: frozenset[tuple[str, str]] = frozenset()
    work_in_flight: Mapping[str, float] = field(default_factory=dict)
    ceiling: Ceiling = field(default_factory=Ceiling)


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
        """What the hop adds in all."""
        return self.network + self.compute + self.queue + self.handicap


def announced_seconds(server: ServerInfo, num_blocks: int, num_tokens: int) -> float:
    """The seconds that `num_tokens` take in `num_blocks` of a server's blocks, by the speeds that it announces."""
    decode, prefill = max(server.decode_speed or 0.0, SLOWEST), max(server.prefill_speed or 0.0, SLOWEST)
    return max(1 / decode, num_tokens / prefill) * num_blocks / len(server.span)


def most_announced_seconds(server: ServerInfo, num_blocks: int, num_tokens: int) -> float:
    """The same, if tokens cost all of their time beyond the reading of the weights: the truth lies between the two."""
    decode, prefill = max(server.decode_speed or 0.0, SLOWEST), max(server.prefill_speed or 0.0, SLOWEST)
    return (1 / decode + (num_tokens - 1) / prefill) * num_blocks / len(server.span)


def pass_seconds(hop: Hop, num_tokens: int, *, slowness: float, times: int = 1) -> float:
    """The seconds of a single pass of `num_tokens`, `times` as long as a forward pass, on a server that is else idle.

    The server announces its speed, and was measured to take `slowness` times as long.
    """
    return times * slowness * announced_seconds(hop.server, len(hop.span), num_tokens)


class Costs:
    """The prices of one view of the swarm, in seconds. `None` in place of a server means the client."""

    def __init__(self, needs: Needs, known: Measured) -> None:
        self.needs = needs
        self.known = known
        self.unknown_link = UNKNOWN_ROUND_TRIP / 2
        """The most that a link costs of which nothing is known, except if one of its ends is near the client."""

    def block(self, server: ServerInfo) -> float:
        """The cost of computing one of the server's blocks."""
        needs = self.needs
        seconds = self._block_seconds(server, needs.step_tokens)
        if needs.prompt_tokens:
            seconds += self._block_seconds(server, needs.prompt_tokens) / max(needs.num_steps, 1)
        if needs.dtype is not None and server.dtype != needs.dtype:
            seconds *= OTHER_DTYPE
        return seconds

    def _block_seconds(self, server: ServerInfo, num_tokens: int) -> float:
        """The seconds that `num_tokens` take in one block of a server, as far as it is believed."""
        seconds = announced_seconds(server, 1, num_tokens) * self.known.slowness.get(server.peer, 1.0)
        return max(seconds, self.known.ceiling.block_seconds(num_tokens))

    def _step_seconds(self, server: ServerInfo) -> float:
        """The seconds of a step of one token through all blocks of a server, if it is as fast as it says."""
        return max(1 / max(server.decode_speed or 0.0, SLOWEST), len(server.span) / self.known.ceiling.decode)

    def queue(self, server: ServerInfo) -> float:
        """The wait for others, and for this client's own work in flight.

        A server computes the steps of sessions together. One more comes in the middle of a pass, which has a part of
        the others, and then shares a pass with the rest. What a row adds to a pass follows from how many times faster
        the server is when all passes are full. Where that is not known, and before single passes, the others take a
        step each; they never take more.
        """
        step = self._step_seconds(server)
        others = float(server.queue_length)
        if others and self.needs.session and (gain := _batching_gain(server)) is not None:
            others = min(others, 0.5 + 0.75 * others / gain)
        return others * step + self.known.work_in_flight.get(server.peer, 0.0)

    def waiting(self, server: ServerInfo) -> float:
        """The same, as a number of requests."""
        own = self.known.work_in_flight.get(server.peer, 0.0) / self._step_seconds(server)
        return server.queue_length + own

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
        """The way from the client to the server."""
        return self.known.round_trips.get(server.peer, UNKNOWN_ROUND_TRIP) / 2

    def leave(self, server: ServerInfo) -> float:
        """The way from the last server to the client."""
        return self.reach(server)

    def link(self, sender: ServerInfo | None, receiver: ServerInfo | None) -> float:
        """The way from one server to another, or from or to the client."""
        if sender is None:
            return 0.0 if receiver is None else self.reach(receiver)
        if receiver is None:
            return self.leave(sender)
        there, here = self.leave(sender), self.reach(receiver)
        if (sender.peer, receiver.peer) in self.known.broken_pairs:
            return there + here
        # If the two servers disagree, the longer time counts: one server alone cannot make a link short.
        round_trip = max(_announced(sender, receiver), _announced(receiver, sender))
        if round_trip > 0 and sender.peer != receiver.peer:
            return round_trip / 2
        # Two servers that are both near the client are near each other; a near one and a far one are not.
        return max(min(self.unknown_link, there + here), abs(there - here))

    def links(self, servers: Sequence[ServerInfo]) -> _Array:
        """The seconds [S, S] from each of the servers to each other one: `link` for all of them at once."""
        reach_S = np.array([self.reach(server) for server in servers])
        leave_S = reach_S
        links_SS: _Array = np.empty((len(servers), len(servers)))
        for start in range(0, len(servers), ROWS_AT_ONCE):
            rows_RS, leave_R1 = links_SS[start : start + ROWS_AT_ONCE], leave_S[start : start + ROWS_AT_ONCE, None]
            np.minimum(leave_R1 + reach_S, self.unknown_link, out=rows_RS)
            np.maximum(rows_RS, abs(leave_R1 - reach_S), out=rows_RS)
        senders_N, receivers_N, seconds_N = _announced_links(servers)
        links_SS[senders_N, receivers_N] = seconds_N
        index_of = {server.peer: index for index, server in enumerate(servers)}
        for sender, receiver in self.known.broken_pairs:
            if sender in index_of and receiver in index_of:
                there, here = index_of[sender], index_of[receiver]
                links_SS[there, here] = leave_S[there] + reach_S[here]
        return links_SS

    def hop(self, hop: Hop, sender: ServerInfo | None) -> HopCost:
        """All that a hop costs after `sender`."""
        return HopCost(
            network=self.link(sender, hop.server) + HOP_OVERHEAD,
            compute=self.block(hop.server) * len(hop.span),
            queue=self.queue(hop.server),
            handicap=self.handicap(hop.server),
        )


def _batching_gain(server: ServerInfo) -> float | None:
    """How many times as many tokens a server decodes in full passes as with one session; `None` if unknown."""
    if server.capacity is None or not server.decode_speed:
        return None
    length = len(server.span)
    gain = block_speed_at(server.capacity.block_speeds, length) / (server.decode_speed * length)
    return min(max(1.0, gain), MOST_GAIN)


def _announced(server: ServerInfo, other: ServerInfo) -> float:
    """The round trip in seconds that a server announces to another one; 0 if it announces none."""
    name = short(other.peer)
    return max((seconds for each, seconds in server.round_trips if each == name), default=0.0)


def _announced_links(servers: Sequence[ServerInfo]) -> tuple[_Array, _Array, _Array]:
    """Senders, receivers and seconds of all links that were measured. Of one that is there twice, the last counts."""
    index_of = {short(server.peer): index for index, server in enumerate(servers)}
    said = [each for server in servers for each in server.round_trips]
    one_N = np.repeat(np.arange(len(servers)), [len(server.round_trips) for server in servers])
    other_N = np.array([index_of.get(name, -1) for name, _ in said], dtype=int)
    seconds_N = np.array([seconds for _, seconds in said]) / 2
    is_link_N = (other_N >= 0) & (other_N != one_N) & (seconds_N > 0)
    one_N, other_N, seconds_N = one_N[is_link_N], other_N[is_link_N], seconds_N[is_link_N]
    senders_N, receivers_N = np.concatenate((one_N, other_N)), np.concatenate((other_N, one_N))
    seconds_N = np.concatenate((seconds_N, seconds_N))
    order_N = np.argsort(seconds_N, kind="stable")  # of two that disagree, the longer comes last
    return senders_N[order_N], receivers_N[order_N], seconds_N[order_N]
