"""Into which pieces a long prompt is cut, so that all servers of a ring compute at once.

    server 1   ▇1▇ ▇2▇ ▇3▇ ▇4▇                    m pieces on n servers that are equally fast:
    server 2       ▇1▇ ▇2▇ ▇3▇ ▇4▇                (m + n - 1) times as long as a piece on one of them
    server 3           ▇1▇ ▇2▇ ▇3▇ ▇4▇

Short pieces reach the last server sooner. But each costs every server something beyond its tokens: the reading of the
weights, and messages. So the best length follows from what servers announce, and from the number of servers. Pieces of
equal length are the best: the longest one decides when the last server begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from shoal.policy.routing.costs import HOP_OVERHEAD, Costs, Hop, Measured, Needs
from shoal.protocol import MAX_STEP_TOKENS, MAX_STEPS_AHEAD

GRAIN = 16
"""Pieces have a multiple of this many tokens of each sequence: whole pages."""
SHORT_TOKENS = 80
"""So few tokens go in one piece, as the guesses of a step do."""
USUAL_TOKENS = 256
"""The length of pieces where no other is much better. Shorter ones cost other clients of the servers more, and a server
does not remember longer answers, should it be asked for them again."""
WORTH = 0.95
"""What a better length has to take at most, of the time of the usual one."""
FIXED_TOKENS = 16.0
"""What a piece costs beyond its tokens, as a number of tokens, on a server that announces no speed. It was 12 for
products of packed weights (`docs/performance.md`), and each piece is some messages."""
MOST_IN_FLIGHT = MAX_STEPS_AHEAD
"""Pieces of one session that are under way: any server may come to hold all of them."""
MOST_TOKENS_IN_FLIGHT = 4 * MAX_STEP_TOKENS
"""The tokens, of all sequences, of these pieces: their inputs stay in the memory of servers."""


@dataclass(frozen=True)
class StageCost:
    """The seconds that a piece takes one server: `fixed`, and for each token to compute it, and to send it once.

    The server sends its outputs twice, first to the next server and then to the client. The last one sends them once.
    """

    fixed: float
    each: float
    each_sent: float = 0.0


@dataclass(frozen=True)
class RingCost:
    """What pieces cost the servers of a ring, in order. All trips of a small message around it take `trips` seconds."""

    stages: tuple[StageCost, ...]
    trips: float = 0.0

    def first_seconds(self, num_tokens: float) -> float:
        """When the outputs of a piece of that length are back, if nothing else is under way."""
        each = sum(stage.each + stage.each_sent for stage in self.stages) + self.stages[0].each_sent
        return self.trips + sum(stage.fixed for stage in self.stages) + each * num_tokens

    def busy_seconds(self, num_tokens: float) -> float:
        """How long such a piece keeps the busiest server, or the busiest link, from the next piece."""
        last = self.stages[-1]
        links = [2 * stage.each_sent for stage in self.stages[:-1]] + [last.each_sent]
        computing = max(stage.fixed + stage.each * num_tokens for stage in self.stages)
        return max(computing, max(links) * num_tokens)


def ring_cost(hops: Sequence[Hop], known: Measured) -> RingCost:
    """What pieces cost these servers, as they announce it and as the client has measured them.

    If one of them announces no speed, only their number counts.
    """
    costs, stages = Costs(Needs(), known), []
    for hop in hops:
        server, part = hop.server, len(hop.span) / len(hop.server.span)
        if not server.decode_speed or not server.prefill_speed:
            return RingCost((StageCost(FIXED_TOKENS, 1.0),) * len(hops))
        slowness = known.slowness.get(server.peer, 1.0)
        one, each = part * slowness / server.decode_speed, part * slowness / server.prefill_speed
        network = None if server.capacity is None else server.capacity.network_speed
        stages.append(StageCost(HOP_OVERHEAD + max(0.0, one - each), each, 1 / network if network else 0.0))
    servers = [None, *(hop.server for hop in hops), None]
    trips = sum(costs.link(sender, receiver) for sender, receiver in pairwise(servers))
    return RingCost(tuple(stages), trips)


def prompt_seconds(ring: RingCost, num_tokens: int, piece: int, *, rows: int = 1) -> float:
    """When the outputs of `num_tokens` tokens of each of `rows` sequences are back, in pieces of `piece` tokens."""
    num_pieces = ceil(num_tokens / piece)
    at_once = max(1, min(MOST_IN_FLIGHT, MOST_TOKENS_IN_FLIGHT // (piece * rows)))
    first, busy = ring.first_seconds(piece * rows), ring.busy_seconds(piece * rows)
    rounds, rest = divmod(num_pieces - 1, at_once)
    return first + rounds * max(first, at_once * busy) + rest * busy


def piece_length(ring: RingCost, num_tokens: int, *, rows: int = 1) -> int:
    """Of how many tokens of each sequence the pieces are in which a prompt of `rows` sequences is back soonest.

    It is a multiple of `GRAIN`, except where `GRAIN` tokens of all rows are too large for one message.
    """
    longest = max(1, MAX_STEP_TOKENS // rows)
    if num_tokens <= SHORT_TOKENS or longest <= GRAIN:
        return min(longest, USUAL_TOKENS)
    longest -= longest % GRAIN
    usual = min(longest, USUAL_TOKENS)
    # Of lengths that make as many pieces, the shortest is the best: its last piece is no small remainder.
    numbers = {ceil(num_tokens / length) for length in range(GRAIN, longest + 1, GRAIN)}
    lengths = {GRAIN * ceil(num_tokens / number / GRAIN) for number in numbers}

    def seconds(length: int) -> float:
        return prompt_seconds(ring, num_tokens, length, rows=rows)

    best = min(sorted(lengths, reverse=True), key=seconds)
    return best if seconds(best) < WORTH * seconds(usual) else usual
