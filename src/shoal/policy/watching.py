"""Which servers a server watches, so that it notices at once when blocks lose their holder.

Records say for a minute that a server is there which was killed. An open stream says within a second that it is not.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Set

from shoal.peers import ServerInfo
from shoal.policy.view import SwarmView

MAX_WATCHED = 16
"""How many servers a server watches: each costs a stream, and a ping every few seconds."""


def choose_watched(view: SwarmView, own_peer: str) -> tuple[ServerInfo, ...]:
    """The servers to watch, at most `MAX_WATCHED`: first those that hold blocks which few others hold.

    Of servers that are alike, each server watches others, so that in a large swarm all are watched.
    """
    count = Counter(block for server in view.online().servers for block in server.span)
    others = [each for each in view.servers if each.peer != own_peer and each.state.counts]

    def rank(server: ServerInfo) -> tuple[int, bytes]:
        return min(count[block] for block in server.span), _distance(own_peer, server.peer)

    return tuple(sorted(others, key=rank)[:MAX_WATCHED])


def _distance(one: str, other: str) -> bytes:
    return hashlib.sha256(f"{one} {other}".encode()).digest()


def believed_gone(lost: Set[str], answering: Set[str]) -> frozenset[str]:
    """Of the watched peers that were `lost`, those that are believed to be gone: all, as long as any other answers.

    A server that reaches none of them has lost its own network, and should not act on that.
    """
    return frozenset(lost) if answering - lost else frozenset()
