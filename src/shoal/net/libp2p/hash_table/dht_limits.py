"""hivemind's DHT with limits on what peers can look up and store, in one request and in ten seconds.

*What is stored.* A record is taken from its own peer only, whose identity libp2p has proved on this connection. So a
record stands for a peer that was there, and one node cannot fill a key with records of identities that it made.
hivemind also hands on all records to each node that it meets, and any peer can be a new node at any time. Here a new
node gets records from their owners, which renew them every 20 seconds. A `RecordTable` decides what there is room for.

*What is answered.* hivemind answers a lookup with all records of every key, as often as a key is repeated, however
large the answer is. Here an answer has a budget far below the 4 MiB of a message: a larger answer would not arrive at
all. If a key has more records than fit, each answer holds a random choice of them.

*What is read.* hivemind refuses an answer with one invalid record. Whether a record lasts too long depends on the
reader's clock, so one record that nearly did would hide all others of its key. Here only that one is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hivemind.dht import node
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2

from shoal.net.libp2p.hash_table.peer_origins import PeerOrigins
from shoal.net.libp2p.hash_table.record_table import ENTRY_BYTES, RecordTable
from shoal.net.libp2p.hash_table.request_limits import ANSWERED, KEY_COST_BYTES, STORED, RequestLimits
from shoal.net.libp2p.membership import ANSWER, OPEN, REQUEST, Membership
from shoal.net.records import MAX_RECORD_BYTES
from shoal.policy.network.table_room import UNKNOWN, Origin

KEY_BYTES = 20
"""The size of a DHT key, which is a SHA-1 hash."""
MAX_FIND_KEYS = 128
"""The keys of one lookup. shoal's own have at most 64: hivemind asks one peer for about the square root of all keys."""
MAX_ANSWER_BYTES = 2 << 20
"""The records in one answer, over all keys."""
MAX_STORED_RECORDS = 32
"""The records of one store request, which are all of one peer. hivemind sends one."""
MAX_KEY_BYTES = 512 << 10
"""The records of one key in one answer: those of a key that one peer fills leave room for the other keys."""
MAX_READ_RECORDS = 1024
"""The records of one key in an answer that are looked at: each costs the check of a signature."""


class InvalidRequest(ValueError):
    """A request that no shoal peer makes. hivemind sends the message to the peer that made it."""


async def create_node(membership: Membership, table: RecordTable, origins: PeerOrigins, **options: Any) -> Any:
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
    created.protocol.use(table, origins)
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
        self._table = RecordTable()
        self._origins: PeerOrigins | None = None
        self.stored, self.answered = RequestLimits(STORED), RequestLimits(ANSWERED)
        self._tasks: set[asyncio.Task[Any]] = set()

    def use(self, table: RecordTable, origins: PeerOrigins | None) -> None:
        """Store records in this table, and ask `origins` where peers come from."""
        self._table = self.storage = table
        self._origins = origins

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        name: str = DHTProtocol._get_handle_name(namespace, method_name)
        return name

    @property
    def _membership(self) -> Membership:
        """That of the swarm; a node that is not shoal's but in the same process has none, and is open."""
        return self.authorizer if isinstance(self.authorizer, Membership) else OPEN

    async def close(self) -> None:
        """Cancel what is under way."""
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._origins is not None:
            await self._origins.close()

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

        A repeated key is answered once. Raises `InvalidRequest`, also for a peer that has asked for too much
        lately, and `NotAMember`.
        """
        self._membership.check(request, REQUEST, context.remote_id)
        if len(request.keys) > MAX_FIND_KEYS or any(len(key) != KEY_BYTES for key in request.keys):
            raise InvalidRequest(f"a lookup of {len(request.keys)} keys")
        asking, origin = await self._sender(context)
        if not self.answered.allows(asking, origin):
            raise InvalidRequest("too many lookups at a time")
        self._add_to_routing_table(request.peer, context)
        response = dht_pb2.FindResponse(results=[], peer=self.node_info)
        keys = list(map(DHTID.from_bytes, request.keys))
        unanswered = set(keys)
        bytes_left = MAX_ANSWER_BYTES
        for key in keys:
            if key not in unanswered:
                response.results.append(dht_pb2.FindResult(type=dht_pb2.NOT_FOUND))
                continue
            result = self._find_result(key, min(bytes_left // len(unanswered), MAX_KEY_BYTES))
            unanswered.remove(key)
            bytes_left -= len(result.value)
            excluded = DHTID.from_bytes(request.peer.node_id)
            for node_id, peer_id in self.routing_table.get_nearest_neighbors(key, k=self.bucket_size, exclude=excluded):
                result.nearest_node_ids.append(node_id.to_bytes())
                result.nearest_peer_ids.append(peer_id.to_bytes())
            response.results.append(result)
        self.answered.spent(max(response.ByteSize(), KEY_COST_BYTES * len(keys)), asking, origin)
        return self._signed(response, context)

    def _find_result(self, key: DHTID, most_bytes: int) -> dht_pb2.FindResult:
        """The answer for one key."""
        item = self._table.part(key, most_bytes=most_bytes)
        if item is None:
            return dht_pb2.FindResult(type=dht_pb2.NOT_FOUND)
        value = self.serializer.dumps(item.value)
        return dht_pb2.FindResult(type=dht_pb2.FOUND_DICTIONARY, value=value, expiration_time=item.expiration_time)

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Store the first `MAX_STORED_RECORDS` records, those of the peer that sends them.

        Raises `InvalidRequest`, and `NotAMember`.
        """
        self._membership.check(request, REQUEST, context.remote_id)
        parts = request.keys, request.subkeys, request.values, request.expiration_time, request.in_cache
        if len(set(map(len, parts))) > 1 or any(len(key) != KEY_BYTES for key in request.keys):
            raise InvalidRequest("malformed keys, or keys without a value")
        sender, origin = await self._sender(context)
        self._add_to_routing_table(request.peer, context)
        own_subkey = self.serializer.dumps(sender)
        response = dht_pb2.StoreResponse(store_ok=[], peer=self.node_info)
        for number, (key, subkey, value, expires, in_cache) in enumerate(zip(*parts, strict=True)):
            may_be_stored = (
                number < MAX_STORED_RECORDS
                and not in_cache  # there is no cache
                and subkey == own_subkey
                and len(value) <= MAX_RECORD_BYTES + ENTRY_BYTES
                and self._table.is_newer(DHTID.from_bytes(key), sender, expires)
                and self.stored.allows(sender, origin)
            )
            response.store_ok.append(may_be_stored and self._store_record(key, sender, value, expires, origin))
        return self._signed(response, context)

    def _store_record(self, key: bytes, sender: str, value: bytes, expires: float, origin: Origin) -> bool:
        self.stored.spent(1, sender, origin)
        return self._validate_record(key, self.serializer.dumps(sender), value, expires) and self._table.take(
            DHTID.from_bytes(key), sender, value, expires, origin=origin
        )

    async def _sender(self, context: P2PContext) -> tuple[str, Origin]:
        """The peer that made a request, and the network that it is connected from."""
        peer = context.remote_id.to_base58()
        return peer, UNKNOWN if self._origins is None else await self._origins.origin(peer)

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Leave only valid records in what a peer has answered, which may be anything. The answer is always used."""
        with dictionary.freeze():
            found = [*dictionary.items()]
        dictionary.clear()
        dictionary.maxsize, dictionary.latest_expiration_time = float("inf"), float("-inf")
        for subkey, (value, expires) in found[:MAX_READ_RECORDS]:
            if self._validate_record(key_bytes, self.serializer.dumps(subkey), value, expires):
                dictionary.store(subkey, value, expires)
        return True

    def _add_to_routing_table(self, peer: dht_pb2.NodeInfo, context: P2PContext) -> None:
        """Ping the requesting peer if it is a DHT node, which adds it to the routing table."""
        if peer.node_id:
            self._start(super().rpc_ping(dht_pb2.PingRequest(peer=peer), context))

    async def update_routing_table(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        """Note that a peer is there, or that it did not respond.

        A peer has one place in the table: with a new node id it moves there, unless another peer has it. hivemind's own
        method would also hand on the records, and remembers more nodes as replacements than there are peers.
        """
        table = self.routing_table
        place = table.get(peer_id=peer_id)
        if not responded:
            node_id = place if node_id is None else node_id
            if node_id is not None and table.get(node_id=node_id) == peer_id:
                del table[node_id]
            return
        if node_id is None or table.get(node_id=node_id) not in (None, peer_id):
            return
        if place is not None and place != node_id:
            del table[place]
        bucket = table.buckets[table.get_bucket_index(node_id)]
        if node_id not in table and len(bucket.replacement_nodes) >= self.bucket_size:
            to_ping = bucket.request_ping_node()
        else:
            to_ping = table.add_or_update_node(node_id, peer_id)
        if to_ping is not None:  # the bucket is full: if its least recent peer has gone, there is room
            self._start(self.call_ping(to_ping[1]))

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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
