"""What the directory takes of a server's memory when strangers fill it.

    python -m benchmarks.directory.memory

Valid records of very many identities, each from its own peer, are stored until the table has replaced itself several
times, and full keys are looked up. It prints the growth of the process's memory after each part, what a record takes
beside its bytes, and how long storing and answering take. The exit status is 1 if the growth exceeds the budget of the
table and of the opened records by more than 64 MiB.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
from hivemind.dht import routing
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from benchmarks.common.machine import describe_machine
from shoal.host.processes import interruptible
from shoal.net.addressing.origins import origin_of
from shoal.net.identity import Identity
from shoal.net.libp2p.hash_table.dht_limits import LimitedDHTProtocol
from shoal.net.libp2p.hash_table.opened_records import MAX_OPENED_BYTES
from shoal.net.libp2p.hash_table.record_table import MAX_TABLE_BYTES, RecordTable
from shoal.net.libp2p.hash_table.record_validator import RecordValidator
from shoal.net.records import Announcement, seal
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.network.table_room import Origin
from shoal.spans import Span

SPARE_BYTES = 64 << 20
TIMES = 2
"""How often the table is filled."""
NUM_IDENTITIES = 1000
PEERS_OF_A_MODEL = 200
ADDRESSES = {"usual": ("/ip4/203.0.113.5/tcp/31337",) * 2, "largest": ("a" * 300,) * 8}
NUM_LOOKUPS = 100
pack = MSGPackSerializer.dumps


class Origins:
    """Each peer in a network of its own: the worst for the table, which then has to compare all of them."""

    async def origin(self, peer: str) -> Origin:
        number = hash(peer)
        return origin_of(f"/ip4/10.{number % 256}.{number // 256 % 256}.1/tcp/1")

    async def close(self) -> None: ...


def protocol(table: RecordTable) -> Any:
    made: Any = LimitedDHTProtocol(_initialized_with_create=True)
    made.node_id = routing.DHTID.generate()
    made.node_info = dht_pb2.NodeInfo(node_id=made.node_id.to_bytes())
    made.bucket_size, made.num_replicas = 20, 5
    made.use(table, Origins())
    made.routing_table = routing.RoutingTable(made.node_id, 20, 5)
    made.record_validator = RecordValidator()
    made.authorizer = None
    return made


def record(identity: Identity, number: int, addresses: tuple[str, ...]) -> tuple[Announcement, bytes]:
    model = ModelInfo(key=f"{number:032x}", name="org/model", family="llama", num_blocks=32)
    info = ServerInfo(
        peer=identity.peer,
        span=Span(0, 8),
        state=ServerState.ONLINE,
        fingerprint="f" * 32,
        decode_speed=1e9,
        prefill_speed=1e9,
        cache_tokens_left=1 << 20,
        dtype="bfloat16",
        quantization="none",
        version="1",
        addresses=addresses,
    )
    announcement = Announcement.of(model, info, expires=time.time() + 290)
    return announcement, seal(identity, announcement)


async def fill(node: Any, identities: list[Identity], addresses: tuple[str, ...]) -> tuple[list[bytes], float]:
    """Store records until the table has been filled `TIMES` times. Returns some of the keys, and the seconds."""
    sent, busy, keys = 0, 0.0, list[bytes]()
    for number, identity in zip(itertools.count(), itertools.cycle(identities)):
        announcement, sealed = record(identity, number // PEERS_OF_A_MODEL, addresses)
        hashed = [routing.DHTID.generate(key).to_bytes() for key in announcement.dht_keys]
        request = dht_pb2.StoreRequest(
            keys=hashed,
            subkeys=[pack(identity.peer)] * len(hashed),
            values=[pack(sealed)] * len(hashed),
            expiration_time=[announcement.expires] * len(hashed),
            in_cache=[False] * len(hashed),
        )
        began = time.perf_counter()
        await node.rpc_store(
            dht_pb2.StoreRequest.FromString(request.SerializeToString()),
            SimpleNamespace(remote_id=PeerID.from_base58(identity.peer)),
        )
        busy += time.perf_counter() - began
        keys.append(hashed[-1])
        sent += len(sealed) * len(hashed)
        if sent > TIMES * MAX_TABLE_BYTES:
            return keys[-200:], busy / (number + 1)
    raise AssertionError("identities have no end")


async def look_up(node: Any, keys: list[bytes]) -> float:
    request = dht_pb2.FindRequest(keys=list(dict.fromkeys(keys))[:64])
    began = time.perf_counter()
    for _ in range(NUM_LOOKUPS):
        reader = SimpleNamespace(remote_id=PeerID.from_base58(Identity.temporary().peer))
        (await node.rpc_find(request, reader)).SerializeToString()
    return (time.perf_counter() - began) / NUM_LOOKUPS


async def measure(kind: str) -> int:
    """Fill a table with records of one kind. Returns by how many bytes the memory of this process grew."""
    identities = [Identity.temporary() for _ in range(NUM_IDENTITIES)]
    process = psutil.Process()
    table = RecordTable()
    node = protocol(table)
    gc.collect()
    before = process.memory_info().rss
    keys, store_seconds = await fill(node, identities, ADDRESSES[kind])
    filled = process.memory_info().rss - before
    find_seconds = await look_up(node, keys)
    grown = process.memory_info().rss - before
    print(
        f"{kind} records: {len(table):,} in the table, which counts {table.num_bytes / 2**20:.1f} MiB; memory "
        f"+{filled / 2**20:.0f} MiB, after {NUM_LOOKUPS} lookups +{grown / 2**20:.0f} MiB; a store of three records "
        f"takes {store_seconds * 1e3:.2f} ms, a lookup of 64 keys {find_seconds * 1e3:.1f} ms"
    )
    return grown


@interruptible()
def main() -> int:
    if len(sys.argv) > 1:
        return int(asyncio.run(measure(sys.argv[1])) > MAX_TABLE_BYTES + MAX_OPENED_BYTES + SPARE_BYTES)
    print(describe_machine(), file=sys.stderr)
    print(f"the budget: {(MAX_TABLE_BYTES + MAX_OPENED_BYTES) / 2**20:.0f} MiB", flush=True)
    command = [sys.executable, "-m", "benchmarks.directory.memory"]
    return max(subprocess.run([*command, kind], check=False).returncode for kind in ADDRESSES)


if __name__ == "__main__":
    sys.exit(main())
