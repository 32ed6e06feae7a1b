"""Servers that want blocks at the same moment: who takes which, and whether a server may go from where it is.

A server that joins claims a span by announcing that it is joining there. A server that serves other blocks announces
that it wants the span. Such a claim is *open* while the record says nothing about when the server will be ready. The
server then looks at all claims. Open claims of servers that join are settled in the order of the peer ids, by one rule
for all: each server may keep what it would choose after those before it. Equal views give equal results, so servers
that start together spread. A claim that was confirmed is not reconsidered: later servers take other blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from shoal.peers import ServerInfo, ServerState
from shoal.policy.machines.machine import Machine, machine_of, machines_of, one_place_each
from shoal.policy.placement.joining import Placed
from shoal.policy.view import SwarmView
from shoal.spans import Span

Choose = Callable[[Machine, Sequence[Machine]], Placed]
"""Where a machine without blocks would go, beside other machines. It has to be the same function for equal machines."""


def is_open_claim(server: ServerInfo) -> bool:
    """Whether a server that has no blocks wants these, and has not confirmed it."""
    return server.state is ServerState.JOINING and server.ready_at is None


def wants_openly(server: ServerInfo) -> bool:
    """Whether a server that serves its span wants another one, and has not confirmed it."""
    return server.wants is not None and server.ready_at is None


def machines_in(view: SwarmView, *, now: float) -> list[Machine]:
    """The servers of a view that hold, load or claim blocks, as placement sees them, at the Unix time `now`."""
    return [machine for server in view.servers for machine in machines_of(server, now=now)]


def settled(
    own: ServerInfo, view: SwarmView, *, choose: Choose, now: float, crowd: Sequence[Machine] | None = None
) -> Placed:
    """The blocks that remain for the server `own`, whose claim is open, after all claims of the view that come first.

    `view` may or may not have a record of `own`. Open claims of servers that serve other blocks do not count: those
    give way to servers that join. In a swarm too large to be read whole, `crowd` are all of its servers, as averages.
    """
    others = view.only(lambda each: each.peer != own.peer)
    certain = tuple(
        replace(each, wants=None) if wants_openly(each) else each for each in others.servers if not is_open_claim(each)
    )
    machines = list(crowd or ()) or machines_in(replace(others, servers=certain), now=now)
    for claim in sorted((own, *others.only(is_open_claim).servers), key=lambda each: each.peer):
        placed = choose(without_span(claim, now=now), machines)
        if claim.peer == own.peer:
            return placed
        machines.append(at(claim, placed.span, now=now))
    raise AssertionError("the own claim is among the claims")


def without_span(server: ServerInfo, *, now: float) -> Machine:
    """A server that is going to choose, as placement sees it."""
    return _replaced(server, None, now=now)


def at(server: ServerInfo, span: Span, *, now: float) -> Machine:
    """A server as placement sees it once it holds this span."""
    return _replaced(server, span, now=now)


def _replaced(server: ServerInfo, span: Span | None, *, now: float) -> Machine:
    machine = machine_of(server, now=now)
    assert machine is not None, "a server that is leaving claims nothing"
    return replace(machine, span=span)


def uncovered(held: Span, kept: Span | None, others: Sequence[Machine]) -> list[int]:
    """The blocks of `held` that no server would serve while their server, which keeps `kept`, loads other blocks.

    `others` are the other servers. Only those that are online count, and of one that wants other blocks only what it
    keeps: one that is loading may fail, and one that has claimed other blocks is about to go.
    """
    served = {block for other in one_place_each(others) for block in other.serves or ()}
    return [block for block in held if block not in served and (kept is None or block not in kept)]


def yields_to(own_peer: str, fills: Sequence[int], others: SwarmView) -> ServerInfo | None:
    """The server to which the server `own_peer` leaves the blocks that it wants to fill, if there is one.

    That is one that holds all of them, or that loads or claims them and comes first: it has confirmed its claim, or
    joins without having other blocks, or has the smaller peer id. `others` are the other servers.
    """
    for server in others.servers:
        if not fills or not server.state.counts:
            continue
        comes_first = not wants_openly(server) or server.peer < own_peer
        spans = (server.span, server.wants if comes_first else None)
        if any(span is not None and all(block in span for block in fills) for span in spans):
            return server
    return None
