"""The servers of a model at one moment, and which blocks each holds. All decisions are made on such a view."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from shoal.peers import ServerInfo, ServerState
from shoal.spans import Span

ASSUMED_SPEED = 1.0
"""Tokens per second assumed of a server that has not measured its speed yet, when a span is chosen."""


@dataclass(frozen=True)
class SwarmView:
    """The servers of one model, as last read from the directory.

    Blocks that are `pinned` to a peer count as held by that peer alone, also if others announce them.
    """

    num_blocks: int
    servers: tuple[ServerInfo, ...] = ()
    pinned: tuple[tuple[Span, str], ...] = ()

    def only(self, keep: Callable[[ServerInfo], bool]) -> SwarmView:
        """The same view with those servers only for which `keep` is true."""
        return replace(self, servers=tuple(server for server in self.servers if keep(server)))

    def rather(self, prefer: Callable[[ServerInfo], bool], span: Span) -> SwarmView:
        """The servers that are preferred, and those with blocks of a span that none of these may compute."""
        missing = {*self.only(prefer).missing(span)}
        return self.only(lambda server: prefer(server) or not missing.isdisjoint(server.span))

    def holders(self, span: Span) -> list[list[ServerInfo]]:
        """For each block of a span, the servers that may compute it."""
        found: list[list[ServerInfo]] = [[] for _ in span]
        for server in self.servers:
            for block in range(max(span.start, server.span.start), min(span.end, server.span.end)):
                found[block - span.start].append(server)
        for pinned, peer in self.pinned:
            for block in range(max(span.start, pinned.start), min(span.end, pinned.end)):
                holders = found[block - span.start]
                found[block - span.start] = [server for server in holders if server.peer == peer]
        return found

    def offers_head(self, block: int) -> bool:
        """Whether a server that may compute this block, the last of the model, offers the output head behind it."""
        (holders,) = self.holders(Span(block, block + 1))
        return any(server.head for server in holders)

    def online(self) -> SwarmView:
        """The same view with those servers only that take requests now."""
        return self.only(lambda server: server.state is ServerState.ONLINE)

    def throughput(self) -> list[float]:
        """Tokens per second of every block (the paper's `t_i`), summed over servers that hold or are loading it."""
        total = [0.0] * self.num_blocks
        for server in self.servers:
            if server.state.counts:
                for block in server.span:
                    total[block] += ASSUMED_SPEED if server.decode_speed is None else server.decode_speed
        return total

    def loading(self) -> SwarmView:
        """The servers that load blocks, each with these blocks as its span, also if it serves others meanwhile."""
        found = (
            server if server.wants is None else replace(server, span=server.wants)
            for server in self.servers
            if server.state is ServerState.JOINING or (server.wants is not None and server.ready_at is not None)
        )
        return replace(self, servers=tuple(found))

    def missing(self, span: Span | None = None) -> list[int]:
        """The blocks of a span, by default of the model, that no server of this view may compute."""
        span = span or Span(0, self.num_blocks)
        if not self.pinned:
            held = {block for own in {server.span for server in self.servers} for block in own}
            return [block for block in span if block not in held]
        return [block for block, holders in zip(span, self.holders(span), strict=True) if not holders]


def format_blocks(blocks: Iterable[int]) -> str:
    """Blocks as people read them: `[0, 1, 2, 7]` is `0:3, 7:8`."""
    spans: list[tuple[int, int]] = []
    for block in sorted(set(blocks)):
        if spans and spans[-1][1] == block:
            spans[-1] = (spans[-1][0], block + 1)
        else:
            spans.append((block, block + 1))
    return ", ".join(f"{start}:{end}" for start, end in spans)
