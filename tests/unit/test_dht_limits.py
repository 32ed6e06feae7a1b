"""The limits of what one request can look up in the DHT, and store in it."""

from __future__ import annotations

import asyncio
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht import routing, storage
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from shoal.net.identity import Identity
from shoal.net.libp2p.hash_table import dht_limits, request_limits
from shoal.net.libp2p.hash_table.record_table import RecordTable
from shoal.net.libp2p.hash_table.record_validator import RecordValidator
from shoal.net.records import Announcement, seal, shard_key
from shoal.policy.census.levels import Shard
from shoal.policy.network.table_room import Origin

from .test_directory_records import MODEL, info

pytestmark = pytest.mark.anyio

pack = MSGPackSerializer.dumps
ALICE, BOB = Identity.temporary(), Identity.temporary()
MESSAGE_BYTES = 4 << 20


def sent_by(identity: Identity) -> Any:
    """What hivemind says of a request: libp2p has proved the identity of the peer that sent it."""
    return SimpleNamespace(remote_id=PeerID.from_base58(identity.peer))


READER: Any = sent_by(Identity.temporary())


def expires() -> float:
    """A time at which a record may expire: records that live longer than five minutes are refused."""
    return math.ceil(time.time()) + 200.0


def protocol() -> Any:
    """The protocol of a DHT node, without a network."""
    made = dht_limits.LimitedDHTProtocol(_initialized_with_create=True)
    made.node_id = routing.DHTID.generate()
    made.node_info = dht_pb2.NodeInfo(node_id=made.node_id.to_bytes())
    made.bucket_size, made.num_replicas = 20, 5
    made.use(RecordTable(), None)
    made.cache = storage.DHTLocalStorage()
    made.routing_table = routing.RoutingTable(made.node_id, 20, 5)
    made.record_validator = RecordValidator()
    made.authorizer = None
    return made


def digest(bucket: int) -> Any:
    return routing.DHTID.generate(shard_key(MODEL.key, Shard(bucket, 0, 0)))


def fill(node: Any, *, records: int, bucket: int = 0, size: int = 4096) -> None:
    """Store this number of records of the largest size under one key. Their signatures do not matter here."""
    origin = Origin("192.0.2.0/24", "192.0.0.0/16")
    for number in range(records):
        node.storage.take(digest(bucket), f"peer {number}", bytes(size), expires(), origin=origin)


def lookup(*buckets: int) -> Any:
    return dht_pb2.FindRequest(keys=[digest(bucket).to_bytes() for bucket in buckets])


def records_in(result: Any) -> dict[str, bytes]:
    if result.type == dht_pb2.NOT_FOUND:
        return {}
    return {subkey: value for subkey, (value, _) in MSGPackSerializer.loads(result.value).items()}


async def test_a_repeated_key_is_answered_once() -> None:
    node = protocol()
    fill(node, records=100)
    answer = await node.rpc_find(lookup(*[0] * 100), READER)
    assert [len(records_in(result)) for result in answer.results] == [100] + [0] * 99
    assert answer.ByteSize() < MESSAGE_BYTES / 2


async def test_a_lookup_of_too_many_keys_is_refused() -> None:
    keys = [bytes([number % 256, number // 256]) + bytes(18) for number in range(1100)]
    with pytest.raises(dht_limits.InvalidRequest):
        await protocol().rpc_find(dht_pb2.FindRequest(keys=keys), READER)
    with pytest.raises(dht_limits.InvalidRequest):
        await protocol().rpc_find(dht_pb2.FindRequest(keys=[bytes(100_000)]), READER)


async def test_the_keys_of_a_lookup_divide_the_answer() -> None:
    node = protocol()
    for bucket in range(8):
        fill(node, records=300, bucket=bucket)
    answer = await node.rpc_find(lookup(*range(8)), READER)
    numbers = [len(records_in(result)) for result in answer.results]
    assert min(numbers) >= 60
    assert answer.ByteSize() < MESSAGE_BYTES * 3 // 4


async def test_a_key_that_somebody_fills_takes_at_most_half_a_mebibyte() -> None:
    node = protocol()
    fill(node, records=1200)
    answer = await node.rpc_find(lookup(0), READER)
    assert len(records_in(answer.results[0])) > 100
    assert answer.ByteSize() <= 512 << 10


async def test_every_lookup_finds_a_server_of_another_network_under_a_key_that_somebody_fills() -> None:
    node = protocol()
    fill(node, records=1200)
    origin = Origin("198.51.100.0/24", "198.51.0.0/16")
    assert node.storage.take(digest(0), "honest", b"here", expires(), origin=origin)
    fill(node, records=1200)
    for _ in range(20):
        reader = sent_by(Identity.temporary())
        seen = records_in((await node.rpc_find(lookup(0), reader)).results[0])
        assert seen["honest"] == b"here"
        assert len(seen) > 100


async def test_a_peer_that_asks_for_too_much_at_a_time_is_refused_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, now = protocol(), 0.0
    node.answered = request_limits.RequestLimits(request_limits.ANSWERED, clock=lambda: now)
    for bucket in range(4):
        fill(node, records=120, bucket=bucket)

    async def greedy() -> int:
        """The bytes that one peer gets at this time."""
        num_bytes = 0
        while True:
            try:
                num_bytes += (await node.rpc_find(lookup(*range(4)), READER)).ByteSize()
            except dht_limits.InvalidRequest:
                return num_bytes

    allowed = request_limits.ANSWERED.of_peer
    assert allowed <= await greedy() < allowed + dht_limits.MAX_ANSWER_BYTES
    assert len(records_in((await node.rpc_find(lookup(0), sent_by(BOB))).results[0])) == 120
    now = request_limits.WINDOW_SECONDS
    assert await greedy() >= allowed / 2


def store_request(*records: tuple[bytes, bytes, bytes, float]) -> Any:
    keys, subkeys, values, expires = zip(*records, strict=True)
    return dht_pb2.StoreRequest(
        keys=keys, subkeys=subkeys, values=values, expiration_time=expires, in_cache=[False] * len(keys)
    )


def record(identity: Identity, *, lifetime: float = 0.0) -> tuple[bytes, bytes, bytes, float]:
    until = expires() + lifetime
    sealed = seal(identity, Announcement.of(MODEL, info(identity), expires=until))
    return digest(0).to_bytes(), pack(identity.peer), pack(sealed), until


async def test_a_valid_record_is_taken_from_its_own_peer_only() -> None:
    node = protocol()
    both = store_request(record(ALICE), record(BOB))
    assert (await node.rpc_store(both, sent_by(ALICE))).store_ok == [True, False]
    assert set(records_in((await node.rpc_find(lookup(0), READER)).results[0])) == {ALICE.peer}
    assert (await node.rpc_store(both, sent_by(BOB))).store_ok == [False, True]
    assert set(records_in((await node.rpc_find(lookup(0), READER)).results[0])) == {ALICE.peer, BOB.peer}


async def test_records_that_one_node_made_for_many_identities_are_not_stored_even_as_a_handover() -> None:
    crowd = [record(Identity.temporary()) for _ in range(dht_limits.MAX_STORED_RECORDS)]
    node = protocol()
    answer = await node.rpc_store(store_request(*crowd), sent_by(ALICE))
    assert not any(answer.store_ok)
    together = storage.DictionaryDHTValue()
    for _, subkey, value, until in crowd:
        together.store(MSGPackSerializer.loads(subkey), value, until)
    handover = store_request((digest(0).to_bytes(), node.IS_DICTIONARY, pack(together), expires()))
    assert (await node.rpc_store(handover, sent_by(ALICE))).store_ok == [False]
    assert len(node.storage) == 0


async def test_only_the_first_records_of_a_request_and_of_ten_seconds_are_validated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, validated, now = protocol(), [], 0.0
    node.stored = request_limits.RequestLimits(request_limits.STORED, clock=lambda: now)
    monkeypatch.setattr(node, "record_validator", SimpleNamespace(validate=lambda each: bool(validated.append(each))))
    request = store_request(*[(bytes(20), pack(ALICE.peer), b"x", expires())] * 3000)
    assert (await node.rpc_store(request, sent_by(ALICE))).store_ok == [False] * 3000
    assert len(validated) == dht_limits.MAX_STORED_RECORDS
    for _ in range(30):
        await node.rpc_store(request, sent_by(ALICE))
    assert len(validated) == request_limits.STORED.of_peer
    now = request_limits.WINDOW_SECONDS
    await node.rpc_store(request, sent_by(ALICE))
    assert len(validated) == request_limits.STORED.of_peer + dht_limits.MAX_STORED_RECORDS


async def test_a_record_that_is_no_news_is_not_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    node, validated = protocol(), []
    request = store_request(record(ALICE, lifetime=1.0))
    assert (await node.rpc_store(request, sent_by(ALICE))).store_ok == [True]
    monkeypatch.setattr(node, "record_validator", SimpleNamespace(validate=lambda each: bool(validated.append(each))))
    for old in request, store_request(record(ALICE)):
        assert (await node.rpc_store(old, sent_by(ALICE))).store_ok == [False]
    assert not validated


async def test_keys_without_records_count_for_the_time_that_they_take() -> None:
    node = protocol()
    node.answered = request_limits.RequestLimits(request_limits.ANSWERED, clock=lambda: 0.0)
    request = dht_pb2.FindRequest(keys=[bytes([number]) + bytes(19) for number in range(128)])
    for _ in range(request_limits.ANSWERED.of_peer // (128 * request_limits.KEY_COST_BYTES)):
        await node.rpc_find(request, READER)
    with pytest.raises(dht_limits.InvalidRequest, match="too many lookups"):
        await node.rpc_find(request, READER)


async def test_values_that_are_too_large_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    node, decoded = protocol(), []
    monkeypatch.setattr(node, "serializer", SimpleNamespace(loads=decoded.append, dumps=pack))
    large = bytes(2 << 20)
    request = store_request((bytes(20), b"", large, expires()), (bytes(20), pack(ALICE.peer), large, expires()))
    assert (await node.rpc_store(request, sent_by(ALICE))).store_ok == [False, False]
    assert not decoded


async def test_values_without_a_subkey_and_inconsistent_requests_are_refused() -> None:
    node = protocol()
    whole = store_request((digest(0).to_bytes(), node.IS_REGULAR_VALUE, b"mine alone", expires()))
    assert (await node.rpc_store(whole, sent_by(ALICE))).store_ok == [False]
    with pytest.raises(dht_limits.InvalidRequest):
        await node.rpc_store(dht_pb2.StoreRequest(keys=[bytes(20)] * 2, values=[b"x"]), sent_by(ALICE))


class Answering:
    """A stub of a peer that gives one answer to each lookup."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def rpc_find(self, _: Any, *, timeout: float | None = None) -> Any:
        return self._answer


async def read(node: Any, answered: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a node makes of these records when a peer answers with them."""
    result = dht_pb2.FindResult(type=dht_pb2.FOUND_DICTIONARY, value=pack(answered), expiration_time=expires())
    answer = dht_pb2.FindResponse(results=[result])
    monkeypatch.setattr(node, "get_stub", lambda _: Answering(answer))
    node.rpc_semaphore, node.wait_timeout = asyncio.Semaphore(1), None
    ((item, _),) = (await node.call_find(PeerID.from_base58(ALICE.peer), [digest(0)])).values()
    return item


async def test_an_invalid_record_in_an_answer_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that lasts as long as it may lasts too long for a reader whose clock is a second behind."""
    answered = storage.DictionaryDHTValue()
    for identity, lifetime in (ALICE, 0.0), (BOB, 300.0):
        _, _, value, until = record(identity, lifetime=lifetime)
        answered.store(identity.peer, value, until)
    item = await read(protocol(), answered, monkeypatch)
    assert set(item.value.data) == {ALICE.peer}


@pytest.mark.parametrize("nonsense", [{"maxsize": "many"}, {"maxsize": 0}, {"latest_expiration_time": b"late"}])
async def test_an_answer_with_nonsense_around_its_records_is_read_as_one_without(
    nonsense: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = storage.DictionaryDHTValue()
    _, _, value, until = record(ALICE)
    answered.store(ALICE.peer, value, until)
    for name, what in nonsense.items():
        setattr(answered, name, what)
    with answered.freeze():
        item = await read(protocol(), answered, monkeypatch)
    _, _, later, end = record(BOB, lifetime=1.0)
    item.value.store(BOB.peer, later, end)  # as hivemind merges answers
    assert set(item.value.data) == {ALICE.peer, BOB.peer}
    assert item.value.latest_expiration_time == end


async def test_of_an_answer_with_very_many_records_the_first_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    node, validated = protocol(), []
    crowd = storage.DictionaryDHTValue()
    for number in range(3000):
        crowd.store(f"{number}", b"x", expires())
    monkeypatch.setattr(node, "record_validator", SimpleNamespace(validate=lambda each: bool(validated.append(each))))
    item = await read(node, crowd, monkeypatch)
    assert len(validated) == dht_limits.MAX_READ_RECORDS
    assert not item.value.data


def node_ids(number: int) -> list[Any]:
    return [routing.DHTID.generate(f"node {each}") for each in range(number)]


async def test_a_peer_that_is_a_new_node_each_time_has_one_place_and_is_handed_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, sent = protocol(), []
    monkeypatch.setattr(node, "call_store", lambda *given, **_: sent.append(given))
    fill(node, records=100)
    peer = PeerID.from_base58(ALICE.peer)
    for node_id in node_ids(100):
        await node.update_routing_table(node_id, peer)
    assert [*node.routing_table.uid_to_peer_id.values()] == [peer]
    assert not sent


async def test_a_node_id_belongs_to_the_peer_that_came_with_it_first() -> None:
    node = protocol()
    (place, other), alice, bob = node_ids(2), *(PeerID.from_base58(each.peer) for each in (ALICE, BOB))
    await node.update_routing_table(place, alice)
    await node.update_routing_table(place, bob)
    await node.update_routing_table(place, bob, responded=False)
    assert node.routing_table.get(node_id=place) == alice
    await node.update_routing_table(other, bob)
    await node.update_routing_table(None, alice, responded=False)
    assert [*node.routing_table.uid_to_peer_id.items()] == [(other, bob)]


async def test_the_routing_table_does_not_grow_with_the_identities_that_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, pinged = protocol(), []

    async def ping(peer: PeerID) -> None:
        pinged.append(peer)

    monkeypatch.setattr(node, "call_ping", ping)
    for node_id in node_ids(3000):
        await node.update_routing_table(node_id, PeerID.from_base58(Identity.temporary().peer))
    await asyncio.sleep(0)
    await node.close()
    table = node.routing_table
    assert len(table.uid_to_peer_id) <= 2 * node.bucket_size * len(table.buckets)
    assert pinged
