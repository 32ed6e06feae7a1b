"""Which other servers a server measures its round trip to: those that may be next to it in a route."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

from shoal.peers import MAX_NEIGHBORS, ServerInfo
from shoal.policy.view import SwarmView

if TYPE_CHECKING:
    import random

EXPLORED = 4
"""Servers of each round that are not among the nearest so far: there may be nearer ones among them."""


def may_be_next(server: ServerInfo, other: ServerInfo) -> bool:
    """Whether a route can go from one of the two servers to the other, in either direction, and get further by it."""
    one, two = server.span, other.span
    follows = one.start < two.start <= one.end < two.end
    precedes = two.start < one.start <= two.end < one.end
    return (follows or precedes) and server.fingerprint == other.fingerprint


def choose_neighbors(
    view: SwarmView,
    server: ServerInfo,
    known: Mapping[str, float],
    rng: random.Random,
    silent: Set[str] = frozenset(),
) -> tuple[ServerInfo, ...]:
    """The servers to measure in this round, at most `MAX_NEIGHBORS`: the nearest that are known, and some strangers.

    `known` are round trips in seconds, by peer id. Of the strangers, those that were never measured come first, then
    those that were far, and last those that were `silent` when they were measured.
    """
    others = [each for each in view.online().servers if each.peer != server.peer and may_be_next(server, each)]
    rng.shuffle(others)
    others.sort(key=lambda each: known.get(each.peer, float("inf")))
    nearest = [each for each in others if each.peer in known][: MAX_NEIGHBORS - EXPLORED]
    strangers = [each for each in others if each not in nearest]
    strangers.sort(key=lambda each: (each.peer in silent, each.peer in known))
    return (*nearest, *strangers[: MAX_NEIGHBORS - len(nearest)])
