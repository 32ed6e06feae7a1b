"""What a stranger may ask of the table, and have it store: never more than an answer holds."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht import routing, storage
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from shoal.net.identity import Identity
from shoal.net.libp2p import table_limits as table
from shoal.net.libp2p.dht_directory import SignedRecords
from shoal.net.records import Announcement, block_key, seal

from .test_directory_records import MODEL, info

pytestmark = pytest.mark.anyio

pack = MSGPackSerializer.dumps
ENDS = math.ceil(time.time()) + 200.0
NOBODY: Any = SimpleNamespace(remote_id=None)
MESSAGE_BYTES = 4 << 20


def protocol() -> Any:
    """A node of the table, without a network."""
    made = table.BoundedProtocol(_initialized_with_create=True)
    made.node_id = routing.DHTID.generate()
    made.node_info = dht_pb2.NodeInfo(node_id=made.node_id.to_bytes())
    made.bucket_size, made.num_replicas = 20, 5
    made.storage, made.cache = storage.DHTLocalStorage(), storage.DHTLocalStorage()
    made.routing_table = routing.RoutingTable(made.node_id, 20, 5)
    made.record_validator = SignedRecords()
    return made


def digest(block: int) -> Any:
    return routing.DHTID.generate(block_key(MODEL.key, block))


def padded(node: Any, *, records: int, block: int = 2, size: int = 4096) -> None:
    """So many records under one key, of the greatest size; who reads them checks them, not this test."""
    for number in range(records):
        node.storage.store_subkey(digest(block), f"peer {number}", bytes(size), ENDS)


def found(result: Any) -> dict[str, bytes]:
    if result.type == dht_pb2.NOT_FOUND:
        return {}
    return {subkey: value for subkey, (value, _) in MSGPackSerializer.loads(result.value).items()}


async def test_a_key_that_is_named_many_times_is_answered_once() -> None:
    node = protocol()
    padded(node, records=200)
    keys = [digest(2).to_bytes()] * 100
    answer = await node.rpc_find(dht_pb2.FindRequest(keys=keys), NOBODY)
    assert [len(found(result)) for result in answer.results] == [200] + [0] * 99
    assert answer.ByteSize() < MESSAGE_BYTES / 2


async def test_a_look_up_of_too_many_keys_is_refused() -> None:
    keys = [bytes([number % 256, number // 256]) + bytes(18) for number in range(1100)]
    with pytest.raises(table.TooMuch):
        await protocol().rpc_find(dht_pb2.FindRequest(keys=keys), NOBODY)
    with pytest.raises(table.TooMuch):
        await protocol().rpc_find(dht_pb2.FindRequest(keys=[bytes(100_000)]), NOBODY)


async def test_many_records_under_many_keys_share_one_answer_and_each_key_has_its_part() -> None:
    node = protocol()
    for block in range(8):
        padded(node, records=300, block=block)
    answer = await node.rpc_find(dht_pb2.FindRequest(keys=[digest(block).to_bytes() for block in range(8)]), NOBODY)
    numbers = [len(found(result)) for result in answer.results]
    assert min(numbers) >= 60
    assert answer.ByteSize() < MESSAGE_BYTES * 3 // 4


async def test_whoever_is_among_too_many_under_a_key_is_found_by_asking_again() -> None:
    node = protocol()
    padded(node, records=1200)
    node.storage.store_subkey(digest(2), "honest", b"here", ENDS)
    request = dht_pb2.FindRequest(keys=[digest(2).to_bytes()])
    seen = [found((await node.rpc_find(request, NOBODY)).results[0]) for _ in range(60)]
    assert any("honest" in each for each in seen)
    assert all(each for each in seen)


def stored(*records: tuple[bytes, bytes, bytes, float]) -> Any:
    keys, subkeys, values, ends = zip(*records, strict=True)
    return dht_pb2.StoreRequest(
        keys=keys, subkeys=subkeys, values=values, expiration_time=ends, in_cache=[False] * len(keys)
    )


def record(identity: Identity, block: int = 2) -> tuple[bytes, bytes, bytes, float]:
    sealed = seal(identity, Announcement.of(MODEL, info(identity), expires=ENDS))
    return digest(block).to_bytes(), pack(identity.peer), pack(sealed), ENDS


async def test_honest_records_are_stored_alone_and_handed_on_together() -> None:
    alice, bob = Identity.temporary(), Identity.temporary()
    node = protocol()
    assert (await node.rpc_store(stored(record(alice), record(bob)), NOBODY)).store_ok == [True, True]
    together = pack(node.storage.get(digest(2)).value)
    other = protocol()
    handed = stored((digest(2).to_bytes(), node.IS_DICTIONARY, together, ENDS))
    assert (await other.rpc_store(handed, NOBODY)).store_ok == [True]
    answer = await other.rpc_find(dht_pb2.FindRequest(keys=[digest(2).to_bytes()]), NOBODY)
    assert set(found(answer.results[0])) == {alice.peer, bob.peer}


async def test_more_than_so_many_records_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    node, looked_at = protocol(), []
    monkeypatch.setattr(node, "record_validator", SimpleNamespace(validate=lambda each: bool(looked_at.append(each))))
    answer = await node.rpc_store(stored(*[(bytes(20), pack("peer"), b"x", ENDS)] * 3000), NOBODY)
    assert len(looked_at) == table.MAX_STORED_RECORDS
    assert answer.store_ok == [False] * 3000
    crowd = storage.DictionaryDHTValue()
    for number in range(3000):
        crowd.store(f"{number}", b"x", ENDS)
    answer = await node.rpc_store(stored((bytes(20), node.IS_DICTIONARY, pack(crowd), ENDS)), NOBODY)
    assert len(looked_at) == 2 * table.MAX_STORED_RECORDS
    assert answer.store_ok == [False]


async def test_values_that_are_too_large_are_not_even_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    node, decoded = protocol(), []
    monkeypatch.setattr(node, "serializer", SimpleNamespace(loads=decoded.append))
    large = bytes(2 << 20)
    request = stored((bytes(20), b"", large, ENDS), (bytes(20), pack("peer"), large, ENDS))
    assert (await node.rpc_store(request, NOBODY)).store_ok == [False, False]
    assert not decoded


async def test_values_without_a_subkey_and_requests_that_do_not_fit_together_are_refused() -> None:
    node = protocol()
    whole = stored((digest(2).to_bytes(), node.IS_REGULAR_VALUE, b"mine alone", ENDS))
    assert (await node.rpc_store(whole, NOBODY)).store_ok == [False]
    with pytest.raises(table.TooMuch):
        await node.rpc_store(dht_pb2.StoreRequest(keys=[bytes(20)] * 2, values=[b"x"]), NOBODY)
