"""Servers that want blocks at the same moment: who takes which, and whether a server may go from where it is.

A server claims a span by announcing that it is joining there. The claim is *open* while its record says nothing about
when the server will be ready. It then looks at all claims. Open claims are settled in the order of the peer ids, by the
same rule for all: each server may keep what it would choose after those before it. Equal views give equal results, so
servers that start together spread. A claim that was confirmed is not reconsidered: later servers take other blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from shoal.peers import ServerInfo, ServerState
from shoal.policy.placement.joining import Placed
from shoal.policy.placement.machines import Machine, machine_of
from shoal.policy.view import SwarmView
from shoal.spans import Span

Choose = Callable[[Machine, Sequence[Machine]], Placed]
"""Where a machine without blocks would go, beside other machines. It has to be the same function for equal machines."""


def is_open_claim(server: ServerInfo) -> bool:
    """Whether a server that has no blocks yet wants these, and has not confirmed it.

    A server that moves from other blocks has measured its speed already. Its claim is not counted: it gives way to
    servers that join.
    """
    return server.state is ServerState.JOINING and server.ready_at is None and server.decode_speed is None


def machines_in(view: SwarmView, *, now: float, served: Mapping[str, ServerInfo] | None = None) -> list[Machine]:
    """The servers of a view that hold or load blocks, as placement sees them, at the Unix time `now`.

    `served` are servers as they were when they last were online, by peer id. One of them that has claimed other blocks,
    and has not confirmed it, occurs twice: where it still serves, and where it wants to go.
    """
    known = served or {}
    records = [
        record
        for server in view.servers
        for record in ((known[server.peer], server) if _is_unsettled(server) and server.peer in known else (server,))
    ]
    machines = (machine_of(record, now=now) for record in records)
    return [machine for machine in machines if machine is not None]


def settled(own: ServerInfo, view: SwarmView, *, choose: Choose, now: float) -> Placed:
    """The blocks that remain for the server `own`, whose claim is open, after all claims of the view that come first.

    `view` may or may not have a record of `own`.
    """
    others = view.only(lambda each: each.peer != own.peer)
    machines = machines_in(others.only(lambda each: not _is_unsettled(each)), now=now)
    for claim in sorted((own, *others.only(is_open_claim).servers), key=lambda each: each.peer):
        placed = choose(without_span(claim, now=now), machines)
        if claim.peer == own.peer:
            return placed
        machines.append(at(claim, placed.span, now=now))
    raise AssertionError("the own claim is among the claims")


def _is_unsettled(server: ServerInfo) -> bool:
    """Whether it only claims blocks: to join, or to move there."""
    return server.state is ServerState.JOINING and server.ready_at is None


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


def uncovered(held: Span, others: SwarmView) -> list[int]:
    """The blocks of `held` that no server would serve while their server loads other blocks.

    `others` are the other servers. Only those that are online count: one that is loading may fail, and one that has
    claimed other blocks is about to go.
    """
    return others.online().missing(held)


def yields_to(own_peer: str, fills: Sequence[int], others: SwarmView) -> ServerInfo | None:
    """The server to which the server `own_peer` leaves the blocks that it wants to fill, if there is one.

    That is one that holds all of them, or that loads or claims them and comes first: it has confirmed its claim, or
    joins without having other blocks, or has the smaller peer id. `others` are the other servers.
    """
    for server in others.servers:
        if not fills or any(block not in server.span for block in fills) or server.state is ServerState.LEAVING:
            continue
        comes_first = not _is_unsettled(server) or is_open_claim(server) or server.peer < own_peer
        if comes_first:
            return server
    return None


def last_online(served: Mapping[str, ServerInfo], view: SwarmView) -> dict[str, ServerInfo]:
    """The servers of a view that serve blocks, by peer id, as they were when they were last online.

    `served` is the same of an earlier view. A server that has only claimed other blocks still serves its old ones.
    """
    found: dict[str, ServerInfo] = {}
    for server in view.servers:
        if server.state is ServerState.ONLINE:
            found[server.peer] = server
        elif _is_unsettled(server) and server.peer in served:
            found[server.peer] = served[server.peer]
    return found
