"""hivemind's DHT with limits on what one request can look up and store.

hivemind answers a lookup with all records of every key, as often as a key is repeated, however large the answer is.
Here an answer has a budget far below the 4 MiB of a message: a larger answer would not arrive at all. If a key has more
records than fit, each answer holds a random choice of them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from typing import Any

from hivemind.dht import node
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2

from shoal.net.libp2p.membership import ANSWER, OPEN, REQUEST, Membership
from shoal.net.records import MAX_RECORD_BYTES

KEY_BYTES = 20
"""The size of a DHT key, which is a SHA-1 hash."""
MAX_FIND_KEYS = 128
"""The keys of one lookup. shoal's own have at most 64: hivemind asks one peer for about the square root of all keys."""
MAX_ANSWER_BYTES = 2 << 20
"""The records in one answer, over all keys."""
RECORD_OVERHEAD_BYTES = 128
"""The most that the DHT adds to a record: its subkey, its expiration time, and lengths."""
MAX_STORED_RECORDS = 512
"""The records of one store request. Each costs the check of a signature."""
MAX_KEY_BYTES = 512 << 10
"""The records of one key in one answer: those of a key that one peer fills leave room for the other keys."""
MAX_VALUE_BYTES = 1 << 20
"""All records of one key together, as a peer hands them over to a peer that is nearer to the key."""


class InvalidRequest(ValueError):
    """A request that no shoal peer makes. hivemind sends the message to the peer that made it."""


async def create_node(membership: Membership, **options: Any) -> Any:
    """A `hivemind.DHTNode` made with these options of `DHTNode.create`, which speaks `LimitedDHTProtocol` to members.

    `DHTNode.create` has no parameter for the class of its protocol, so the name that it looks up is replaced. The
    replacement stays: another node may be created at the same time, and shoal's nodes must all have the limits.
    """
    node.DHTProtocol = LimitedDHTProtocol
    created = await node.DHTNode.create(
        # Reads must be fresh, so nothing is cached: see `NoCache`.
        **options,
        authorizer=membership,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        reuse_get_requests=False,
    )
    created.protocol.cache = NoCache()
    return created


class NoCache(DHTLocalStorage):  # type: ignore[misc]
    """A cache that stores nothing.

    hivemind answers from its cache *instead of* its storage if the cache's entry expires later. Any peer may put a
    record of its own into the cache, and that one record would hide all others of its key.
    """

    def store(self, *_: object, **__: object) -> bool:
        return False

    def store_subkey(self, *_: object, **__: object) -> bool:
        return False


class LimitedDHTProtocol(DHTProtocol):  # type: ignore[misc]
    """hivemind's protocol, under the same names on the wire, with limits, among members of the swarm only.

    `close` it when its node is closed.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._pings: set[asyncio.Task[Any]] = set()

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        name: str = DHTProtocol._get_handle_name(namespace, method_name)
        return name

    @property
    def _membership(self) -> Membership:
        """That of the swarm; a node that is not shoal's but in the same process has none, and is open."""
        return self.authorizer if isinstance(self.authorizer, Membership) else OPEN

    async def close(self) -> None:
        """Cancel the pings that are under way."""
        pings = [*self._pings]
        for ping in pings:
            ping.cancel()
        await asyncio.gather(*pings, return_exceptions=True)

    def get_stub(self, peer: PeerID) -> Any:
        """The requests that a peer answers: both prove to each other that they are members."""
        return _MemberStub(super().get_stub(peer), self._membership, peer)

    async def rpc_ping(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        """Take a member into the routing table. Raises `NotAMember`."""
        self._membership.check(request, REQUEST, context.remote_id)
        return self._signed(await super().rpc_ping(request, context), context)

    def _signed(self, response: Any, context: P2PContext) -> Any:
        self._membership.sign(response, ANSWER, context.remote_id)
        return response

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """For each key, the records that fit into the answer, and the peers that are nearer to the key.

        A repeated key is answered once. Raises `InvalidRequest`, and `NotAMember`.
        """
        self._membership.check(request, REQUEST, context.remote_id)
        if len(request.keys) > MAX_FIND_KEYS or any(len(key) != KEY_BYTES for key in request.keys):
            raise InvalidRequest(f"a lookup of {len(request.keys)} keys")
        self._add_to_routing_table(request.peer, context)
        response = dht_pb2.FindResponse(results=[], peer=self.node_info)
        keys = list(map(DHTID.from_bytes, request.keys))
        items = {key: self.storage.get(key) for key in keys}
        bytes_left, keys_left = MAX_ANSWER_BYTES, len(items)
        for key in keys:
            if key not in items:
                response.results.append(dht_pb2.FindResult(type=dht_pb2.NOT_FOUND))
                continue
            result, size = self._find_result(items.pop(key), min(bytes_left // keys_left, MAX_KEY_BYTES))
            bytes_left, keys_left = bytes_left - size, keys_left - 1
            asking = DHTID.from_bytes(request.peer.node_id)
            for node_id, peer_id in self.routing_table.get_nearest_neighbors(key, k=self.bucket_size, exclude=asking):
                result.nearest_node_ids.append(node_id.to_bytes())
                result.nearest_peer_ids.append(peer_id.to_bytes())
            response.results.append(result)
        return self._signed(response, context)

    def _find_result(self, item: Any, max_bytes: int) -> tuple[dht_pb2.FindResult, int]:
        """The answer for one key, and the bytes of its records."""
        if item is None or not isinstance(item.value, DictionaryDHTValue):  # all of shoal's records have subkeys
            return dht_pb2.FindResult(type=dht_pb2.NOT_FOUND), 0
        chosen, size = choose_records(item.value, max_bytes)
        value = self.serializer.dumps(chosen)
        return dht_pb2.FindResult(
            type=dht_pb2.FOUND_DICTIONARY, value=value, expiration_time=item.expiration_time
        ), size

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Store the first `MAX_STORED_RECORDS` records. Raises `InvalidRequest`, and `NotAMember`."""
        self._membership.check(request, REQUEST, context.remote_id)
        parts = request.keys, request.subkeys, request.values, request.expiration_time, request.in_cache
        if len(set(map(len, parts))) > 1 or any(len(key) != KEY_BYTES for key in request.keys):
            raise InvalidRequest("malformed keys, or keys without a value")
        self._add_to_routing_table(request.peer, context)
        records_left = MAX_STORED_RECORDS
        response = dht_pb2.StoreResponse(store_ok=[], peer=self.node_info)
        for key, subkey, value, expires, in_cache in zip(*parts, strict=True):
            records = [] if in_cache else list(self._unpack_records(subkey, value, expires))  # there is no cache
            stored = [self._store_record(key, *record) for record in records[:records_left]]
            response.store_ok.append(len(stored) == len(records) > 0 and all(stored))
            records_left -= len(stored)
        return self._signed(response, context)

    def _unpack_records(self, subkey: bytes, value: bytes, expires: float) -> Iterator[tuple[bytes, bytes, float]]:
        """The records in one value, which holds a single one or all of a key. Nothing for a value that is too large."""
        if subkey != self.IS_DICTIONARY:
            if len(value) <= MAX_RECORD_BYTES + RECORD_OVERHEAD_BYTES:
                yield subkey, value, expires
        elif len(value) <= MAX_VALUE_BYTES:
            records = self.serializer.loads(value)
            if isinstance(records, DictionaryDHTValue):
                with records.freeze():
                    for each, item in records.items():
                        yield self.serializer.dumps(each), item.value, item.expiration_time

    def _store_record(self, key: bytes, subkey: bytes, value: bytes, expires: float) -> bool:
        if subkey in self.RESERVED_SUBKEYS or not self._validate_record(key, subkey, value, expires):
            return False
        peer = self.serializer.loads(subkey)
        stored: bool = self.storage.store_subkey(DHTID.from_bytes(key), peer, value, expires)
        return stored

    def _add_to_routing_table(self, peer: dht_pb2.NodeInfo, context: P2PContext) -> None:
        """Ping the requesting peer if it is a DHT node, which adds it to the routing table."""
        if peer.node_id:
            task = asyncio.create_task(super().rpc_ping(dht_pb2.PingRequest(peer=peer), context))
            self._pings.add(task)
            task.add_done_callback(self._pings.discard)


class _MemberStub:
    """A stub whose requests prove membership, and whose answers must."""

    def __init__(self, stub: Any, membership: Membership, peer: PeerID) -> None:
        self._stub = stub
        self._membership = membership
        self._peer = peer

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._stub, name)

        async def proven(request: Any, *arguments: Any, **options: Any) -> Any:
            self._membership.sign(request, REQUEST, self._peer)
            answer = await call(request, *arguments, **options)
            self._membership.check(answer, ANSWER, self._peer)
            return answer

        return proven


def choose_records(records: DictionaryDHTValue, max_bytes: int) -> tuple[DictionaryDHTValue, int]:
    """Records of one key that fit into `max_bytes`, and their size in bytes.

    If not all fit, the choice is random, so that repeated lookups find every record.
    """
    subkeys: Sequence[Any] = list(records.data)
    chosen, size = DictionaryDHTValue(), 0
    for subkey in random.sample(subkeys, len(subkeys)):
        value, expires = records.data[subkey]
        needed = len(value) + RECORD_OVERHEAD_BYTES
        if size + needed <= max_bytes:
            chosen.store(subkey, value, expires)
            size += needed
    return chosen, size
