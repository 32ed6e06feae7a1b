"""hivemind's table, with limits on what a stranger may ask of it and store in it.

hivemind answers each key of a look-up with all that it has under it, as often as the key is named, whatever that takes.
Here an answer has a budget, far below the 4 MiB that a message may have: beyond it nothing would arrive at all. Under a
key with more records than fit, an answer holds some of them, others each time. `install` once, before nodes are made.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from typing import Any

from hivemind.dht import node
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2PContext
from hivemind.proto import dht_pb2

from shoal.net.records import MAX_RECORD_BYTES

KEY_BYTES = 20
MAX_FIND_KEYS = 128
"""The keys of one look-up. Ours have at most 64: hivemind asks for the square root of what it looks for."""
ANSWER_BYTES = 2 << 20
"""The records in one answer, over all keys."""
RECORD_OVERHEAD = 128
"""What the table adds to a record at most: the peer that it is about, when it ends, and lengths."""
MAX_STORED_RECORDS = 512
"""The records of one request to store: each costs a signature to check."""
MAX_VALUE_BYTES = 1 << 20
"""All records of one key, handed on by a node that knows a nearer one."""


class TooMuch(ValueError):
    """A request that no peer of ours would make; who sent it is told so, and nothing is done."""


class BoundedProtocol(DHTProtocol):  # type: ignore[misc]
    """The same protocol, under the same name."""

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        name: str = DHTProtocol._get_handle_name(namespace, method_name)
        return name

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """What is known under each key, as far as the answer has room, and who is nearer to it.

        A key that is named again has no second answer. Raises `TooMuch`.
        """
        if len(request.keys) > MAX_FIND_KEYS or any(len(key) != KEY_BYTES for key in request.keys):
            raise TooMuch(f"a look-up of {len(request.keys)} keys")
        self._meet(request.peer, context)
        response = dht_pb2.FindResponse(results=[], peer=self.node_info)
        keys = list(map(DHTID.from_bytes, request.keys))
        items = {key: self.storage.get(key) for key in keys}
        left, num_left = ANSWER_BYTES, len(items)
        for key in keys:
            if key not in items:
                response.results.append(dht_pb2.FindResult(type=dht_pb2.NOT_FOUND))
                continue
            result, taken = self._found(items.pop(key), left // num_left)
            left, num_left = left - taken, num_left - 1
            asking = DHTID.from_bytes(request.peer.node_id)
            for node_id, peer_id in self.routing_table.get_nearest_neighbors(key, k=self.bucket_size, exclude=asking):
                result.nearest_node_ids.append(node_id.to_bytes())
                result.nearest_peer_ids.append(peer_id.to_bytes())
            response.results.append(result)
        return response

    def _found(self, item: Any, most_bytes: int) -> tuple[dht_pb2.FindResult, int]:
        """What is answered to one key, and what that takes of the budget."""
        if item is None or not isinstance(item.value, DictionaryDHTValue):  # records have subkeys, all of them
            return dht_pb2.FindResult(type=dht_pb2.NOT_FOUND), 0
        chosen, taken = choose_records(item.value, most_bytes)
        value = self.serializer.dumps(chosen)
        return dht_pb2.FindResult(
            type=dht_pb2.FOUND_DICTIONARY, value=value, expiration_time=item.expiration_time
        ), taken

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Keep these records, the first `MAX_STORED_RECORDS` of them. Raises `TooMuch`."""
        parts = request.keys, request.subkeys, request.values, request.expiration_time, request.in_cache
        if len(set(map(len, parts))) > 1 or any(len(key) != KEY_BYTES for key in request.keys):
            raise TooMuch("keys that are none, or without a value")
        self._meet(request.peer, context)
        room = MAX_STORED_RECORDS
        response = dht_pb2.StoreResponse(store_ok=[], peer=self.node_info)
        for key, subkey, value, ends, in_cache in zip(*parts, strict=True):
            records = [] if in_cache else list(self._records(subkey, value, ends))  # there is no cache
            kept = [self._keep(key, *record) for record in records[:room]]
            response.store_ok.append(len(kept) == len(records) > 0 and all(kept))
            room -= len(kept)
        return response

    def _records(self, subkey: bytes, value: bytes, ends: float) -> Iterator[tuple[bytes, bytes, float]]:
        """The records in one value: one, or all of a key. None at all for what cannot be any."""
        if subkey != self.IS_DICTIONARY:
            if len(value) <= MAX_RECORD_BYTES + RECORD_OVERHEAD:
                yield subkey, value, ends
        elif len(value) <= MAX_VALUE_BYTES:
            several = self.serializer.loads(value)
            if isinstance(several, DictionaryDHTValue):
                with several.freeze():
                    for each, item in several.items():
                        yield self.serializer.dumps(each), item.value, item.expiration_time

    def _keep(self, key: bytes, subkey: bytes, value: bytes, ends: float) -> bool:
        if subkey in self.RESERVED_SUBKEYS or not self._validate_record(key, subkey, value, ends):
            return False
        peer = self.serializer.loads(subkey)
        kept: bool = self.storage.store_subkey(DHTID.from_bytes(key), peer, value, ends)
        return kept

    def _meet(self, peer: dht_pb2.NodeInfo, context: P2PContext) -> None:
        """The node that asks is put into our table, if it is one."""
        if peer.node_id:
            task = asyncio.create_task(self.rpc_ping(dht_pb2.PingRequest(peer=peer), context))
            _PINGS.add(task)
            task.add_done_callback(_PINGS.discard)


_PINGS: set[asyncio.Task[Any]] = set()


def choose_records(records: DictionaryDHTValue, most_bytes: int) -> tuple[DictionaryDHTValue, int]:
    """As many of a key's records as fit, by chance, and their size: of too many, none is hidden for ever."""
    subkeys: Sequence[Any] = list(records.data)
    chosen, size = DictionaryDHTValue(), 0
    for subkey in random.sample(subkeys, len(subkeys)):
        value, ends = records.data[subkey]
        needed = len(value) + RECORD_OVERHEAD
        if size + needed <= most_bytes:
            chosen.store(subkey, value, ends)
            size += needed
    return chosen, size


def install() -> None:
    """From now on, hivemind's nodes in this process speak the bounded protocol; hivemind has no other way to say so."""
    node.DHTProtocol = BoundedProtocol
