"""What dtype a swarm computes in, and which servers differ.

Servers announce the dtype that each computes in, and how its weights are quantized. A server that joins and a client
compute in the *swarm's dtype*, unless the user names another. That is the dtype in which most blocks are held: a server
counts once for each block that it holds or is loading, also with quantized weights, until it is leaving. Only servers
of the same weights count, and where blocks are pinned to a peer, only that peer. If two dtypes hold equally many
blocks, the model's own wins if it is one of them, else the more precise one. Where there is no server yet, servers and
clients take the model's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from shoal.peers import ServerInfo
from shoal.policy.view import SwarmView
from shoal.spans import Span

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that can be computed in, the most precise first. Others that a server announces do not count."""

MOST_NAMES = 4
"""Servers that a message names for each way of computing: it has to stay a line."""


def swarm_dtype(view: SwarmView, *, fingerprint: str, own: str) -> str | None:
    """The dtype in which a swarm computes with these weights, None without servers; `own` is the model's."""
    view = view.only(lambda server: server.fingerprint == fingerprint and server.state.counts)
    holders = view.holders(Span(0, view.num_blocks))
    held = Counter(server.dtype for of_block in holders for server in of_block if server.dtype in DTYPES)
    return min(held, key=lambda dtype: (-held[dtype], dtype != own, DTYPES.index(dtype)), default=None)


def mixture(servers: Iterable[ServerInfo]) -> str | None:
    """Which servers compute in which dtype, if servers of the same weights differ; None if all agree.

    Their outputs differ then. Quantized weights are a difference as another dtype is.
    """
    peers: dict[str, dict[str, list[str]]] = {}  # by fingerprint and by way of computing
    for server in servers:
        if server.state.counts:
            peers.setdefault(server.fingerprint, {}).setdefault(computes_in(server), []).append(_name(server))
    mixed = [ways for _, ways in sorted(peers.items()) if len(ways) > 1]
    if not mixed:
        return None
    return "; ".join(f"{way}: {_listed(ways[way])}" for ways in mixed for way in sorted(ways))


def computes_in(server: ServerInfo) -> str:
    """The dtype that a server computes in, and how its weights are quantized if they are."""
    return server.dtype if server.quantization == "none" else f"{server.dtype}, {server.quantization}"


def _name(server: ServerInfo) -> str:
    return server.name or server.peer[-6:]


def _listed(names: list[str]) -> str:
    shown = sorted(names)[:MOST_NAMES]
    others = len(names) - len(shown)
    return ", ".join(shown) + (f" and {others} more" if others else "")
