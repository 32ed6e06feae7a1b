"""Reads keys of the DHT at a low cost, and counts what reading costs.

hivemind's own look-up asks about twenty peers for each key, and all of those that store it, usually five, send all
records. Here the peers that store a key are found first, and two of them are asked, other ones each time. So a peer
that hides records, or has not got them yet, hides them for a while only.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue

from shoal.net.libp2p.hash_table.record_validator import unpack_bytes

REPLICAS_ASKED = 2
"""Of the peers that store a key, how many are asked for it."""
BEAM_SIZE = 8
"""How many peers near a key are looked at until those that store it count as found."""
KEYS_AT_ONCE = 4
"""The keys of one request: its answer has to arrive within a second."""

Values = dict[str, bytes]
"""The records of one key, by the peer that they are of."""


class Traffic:
    """The bytes with which the DHT has answered this peer."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def watch(self, protocol: Any) -> None:
        """Count the answers to all requests of this hivemind protocol from now on."""
        get_stub = protocol.get_stub
        protocol.get_stub = lambda peer: _CountingStub(get_stub(peer), self)


class _CountingStub:
    """A stub whose answers are counted."""

    def __init__(self, stub: Any, traffic: Traffic) -> None:
        self._stub = stub
        self._traffic = traffic

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._stub, name)

        async def counted(*arguments: Any, **options: Any) -> Any:
            answer = await call(*arguments, **options)
            self._traffic.num_bytes += answer.ByteSize()
            return answer

        return counted


async def read_thinly(node: Any, keys: Sequence[str], *, stores_records: bool) -> dict[str, list[Values]]:
    """The records under these keys, from each peer that was asked. Keys for which no peer answers are left out."""
    names = {DHTID.generate(key): key for key in keys}
    # Nothing is stored under these neighbors of the keys, and the same peers are nearest to them.
    twins = {DHTID(key ^ 1): key for key in names}
    nearest = await node.find_nearest_nodes(
        [*twins], k_nearest=node.num_replicas, beam_size=max(BEAM_SIZE, node.num_replicas), exclude_self=True
    )
    replicas = {key: random.sample([*nearest[twin].values()], len(nearest[twin])) for twin, key in twins.items()}
    found: dict[DHTID, list[Values]] = {key: [] for key in names}
    answered: set[DHTID] = set()
    if stores_records:
        for key in names:
            if own := _values(node.protocol.storage.get(key)):
                found[key].append(own)
            answered.add(key)

    async def ask(peer: Any, wanted: Sequence[DHTID]) -> None:
        for first in range(0, len(wanted), KEYS_AT_ONCE):
            answer = await node._call_find_with_blacklist(peer, wanted[first : first + KEYS_AT_ONCE])
            for key, (item, _) in (answer or {}).items():
                answered.add(key)
                if values := _values(item):
                    found[key].append(values)

    while requests := _requests(replicas, found):
        await asyncio.gather(*(ask(peer, wanted) for peer, wanted in requests.items()))
    return {names[key]: found[key] for key in names if key in answered}


def _requests(replicas: dict[DHTID, list[Any]], found: dict[DHTID, list[Values]]) -> dict[Any, list[DHTID]]:
    """Which peers to ask next for which keys, and takes them from `replicas`."""
    requests: dict[Any, list[DHTID]] = defaultdict(list)
    for key, peers in replicas.items():
        for _ in range(min(REPLICAS_ASKED - len(found[key]), len(peers))):
            requests[peers.pop()].append(key)
    return requests


def _values(item: Any) -> Values:
    """The records in what a peer stores under one key."""
    if item is None or not isinstance(item.value, DictionaryDHTValue):
        return {}
    values = {peer: unpack_bytes(value) for peer, (value, _) in item.value.items()}
    return {peer: value for peer, value in values.items() if isinstance(peer, str) and value is not None}


async def read_everywhere(node: Any, keys: Collection[str]) -> dict[str, list[Values]]:
    """The records under these keys, from all peers that store them."""
    # hivemind ends a lookup at an answer that expires late enough. No number is later than NaN, so no peer can end
    # the lookup early and hide the answers of the others.
    found = await node.get_many(keys, sufficient_expiration_time=float("nan"))
    return {
        key: [{peer: each.value for peer, each in entry.value.items() if isinstance(each.value, bytes)}]
        if entry is not None and isinstance(entry.value, dict)
        else []
        for key, entry in found.items()
    }
