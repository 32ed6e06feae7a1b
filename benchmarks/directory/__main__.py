"""What the directory costs as a swarm grows: bytes a minute, the largest key, a route, a placement decision.

    python -m benchmarks.directory [--servers 100 1000 10000] [--blocks 80] [--minutes 10] [--json]

One client and one server read a simulated hash table through the code of the live ones (`shoal.net.participant`). The
table holds real signed records of as many servers. A key is answered by as many peers as are asked, and finding these
costs `ROUTING_BYTES` (`python -m benchmarks.directory --routing 30` measures them among real nodes on this machine).
The server also renews its record, and publishes tallies when it is its turn. "first" is the first minute.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.common.machine import describe_machine
from shoal.host.processes import interruptible
from shoal.net.catalog import Listing
from shoal.net.identity import Identity
from shoal.net.participant import Participant
from shoal.net.records import Announcement, seal, unseal
from shoal.net.tallies import ShardTally, seal_tally, unseal_tally
from shoal.net.tally_book import Report
from shoal.peers import MAX_NEIGHBORS, Capacity, ModelInfo, ServerInfo, ServerState, short
from shoal.policy.census.histogram import Histogram, tally_of
from shoal.policy.census.levels import (
    Shard,
    bucket_of,
    level_for,
    num_buckets,
    reporters,
    shard_of,
    shards_at,
    shards_of,
)
from shoal.policy.census.sampling import keep
from shoal.policy.routing.route import Measured, Needs, choose_route
from shoal.policy.view import SwarmView
from shoal.spans import Span

EVERY = 20.0
REPLICAS = 2
RECORD_OVERHEAD = 72
"""Bytes around a record in an answer: its subkey, its time, lengths."""
ROUTING_BYTES = 15_000
"""Bytes that come until the peers that store one key are found: a dozen answers with twenty addresses each."""
STORING_BYTES = 32_000
"""The same for storing, which looks at twenty peers."""
FEW = 40
"""Up to this many servers, all five peers that store a key are asked (`shoal.net.libp2p.hash_table.dht_directory`)."""
ZONES = tuple(f"zone-{index}" for index in range(12))


def make_servers(number: int, num_blocks: int, seed: int) -> tuple[list[Identity], list[ServerInfo]]:
    """Servers with spans of 4 to 16 blocks anywhere, as complete as real ones."""
    rng = random.Random(seed)
    identities = [Identity.temporary() for _ in range(number)]
    found = []
    for identity in identities:
        length = rng.randint(4, min(16, num_blocks))
        start = min(max(rng.randint(-4, num_blocks), 0), num_blocks - length)
        speed = rng.lognormvariate(7.0, 0.7)
        neighbors = rng.sample(identities, min(MAX_NEIGHBORS, number))
        host = f"203.0.{rng.randrange(256)}.{rng.randrange(256)}"
        found.append(
            ServerInfo(
                peer=identity.peer,
                span=Span(start, start + length),
                state=ServerState.ONLINE,
                fingerprint="f" * 64,
                decode_speed=round(speed / length, 2),
                prefill_speed=round(30 * speed / length, 2),
                cache_tokens_left=rng.randrange(1 << 20),
                dtype="bfloat16",
                quantization="none",
                version="0.1.0",
                name=f"machine {rng.randrange(10**6)}",
                addresses=(
                    f"/ip4/{host}/tcp/31337/p2p/{identity.peer}",
                    f"/ip4/10.0.0.2/tcp/31337/p2p/{identity.peer}",
                ),
                encodings=("bfloat16", "int8"),
                queue_length=rng.randrange(4),
                round_trips=tuple((short(each.peer), round(rng.uniform(0.002, 0.2), 5)) for each in neighbors),
                capacity=Capacity(
                    min(24, num_blocks),
                    tuple((size, round(speed * (1.1 - size / 40), 1)) for size in (1, 2, 4, 8, 12, 16, 24)),
                    rng.uniform(100, 5000),
                    1.5,
                    0.4,
                    (Span(start, start + length),),
                ),
                zone=rng.choice(ZONES),
                up_since=1.8e9,
                reason="blocks that few servers hold",
            )
        )
    return identities, found


@dataclass
class Table:
    """A hash table in which the records of all servers always are, as if they had just been renewed."""

    model: ModelInfo
    shards: dict[Shard, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    tallies: dict[int, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    bytes_received: int = 0
    num_keys: int = 0
    num_servers: int = 0
    now: float = 0.0

    async def read(self, model: ModelInfo, shards: Sequence[Shard]) -> dict[Shard, list[Listing]]:
        self._receive([self.shards[shard] for shard in shards])
        expires = self.now + 300.0
        found: dict[Shard, list[Listing]] = {}
        for shard in shards:
            opened = [unseal(record) for record in self.shards[shard]]
            found[shard] = [
                Listing(each.server_info, each.level, expires, version=expires) for each in opened if each is not None
            ]
        return found

    async def read_tallies(self, model: ModelInfo, buckets: Sequence[int]) -> dict[int, list[Report]]:
        self._receive([self.tallies[bucket] for bucket in buckets])
        return {
            bucket: [
                Report(each.peer, each.shard, each.tally, self.now + 300.0)
                for each in map(unseal_tally, self.tallies[bucket])
                if each is not None
            ]
            for bucket in buckets
        }

    def _receive(self, keys: Sequence[Sequence[bytes]]) -> None:
        records = sum(len(record) + RECORD_OVERHEAD for key in keys for record in key)
        replicas = 5 if self.num_servers <= FEW else REPLICAS
        self.bytes_received += records * replicas + ROUTING_BYTES * len(keys)
        self.num_keys += len(keys)

    @property
    def largest_key(self) -> int:
        keys = [*self.shards.values(), *self.tallies.values()]
        return max(sum(len(record) + RECORD_OVERHEAD for record in key) for key in keys)


def make_table(identities: Sequence[Identity], infos: Sequence[ServerInfo], model: ModelInfo) -> Table:
    """The table of a swarm that has its size for a while."""
    table = Table(model, num_servers=len(infos))
    sizes = [0] * num_buckets(model.num_blocks)
    for info in infos:
        sizes[bucket_of(info.span.start)] += 1
    levels = [level_for(size, None) for size in sizes]
    by_peer = {identity.peer: identity for identity in identities}
    for info in infos:
        level = levels[bucket_of(info.span.start)]
        announcement = Announcement.of(model, info, expires=1.8e9 + 300, level=level)
        record = seal(by_peer[info.peer], announcement)
        for shard in shards_of(info.peer, info.span.start, level):
            table.shards[shard].append(record)
    if len(infos) > 400:
        for bucket, level in enumerate(levels):
            for shard in shards_at(bucket, max(level - 1, 0)):
                members = [
                    info
                    for info in infos
                    if bucket_of(info.span.start) == bucket and shard_of(info.peer, bucket, shard.level) == shard
                ]
                tally = tally_of(members, now=0.0)
                for peer in reporters([info.peer for info in members], now=0.0):
                    report = ShardTally.of(peer, model, shard, tally, expires=1.8e9 + 300)
                    table.tallies[bucket].append(seal_tally(by_peer[peer], report))
    return table


@dataclass(frozen=True)
class Reading:
    """The bytes of a peer's first minute, and of each minute later."""

    first: float
    later: float
    keys: float
    known: tuple[ServerInfo, ...]
    histogram: Histogram | None = None


async def read_as_client(table: Table, minutes: int) -> Reading:
    reader = Participant(table, clock=lambda: table.now, rng=random.Random(1), is_client=True)
    began, keys, known = table.bytes_received, table.num_keys, tuple[ServerInfo, ...]()
    first = 0
    for step in range(int(minutes * 60 / EVERY)):
        known = await reader.servers(table.model)
        table.now += EVERY
        if step == int(60 / EVERY) - 1:
            first = table.bytes_received - began
    total = table.bytes_received - began
    return Reading(first, (total - first) / (minutes - 1), (table.num_keys - keys) / minutes, known)


async def read_as_server(table: Table, info: ServerInfo, minutes: int) -> Reading:
    """As a server does: it looks for neighbors and for its place, renews its record, and reports on its shard."""
    reader = Participant(table, clock=lambda: table.now, rng=random.Random(2), is_client=False)
    began, keys, first = table.bytes_received, table.num_keys, 0
    histogram: Histogram | None = None
    for step in range(int(minutes * 60 / EVERY)):
        await reader.servers(table.model)
        histogram = await reader.histogram(table.model)
        publication = reader.next_publication(table.model, info, lifetime=3 * EVERY)
        if publication is not None:
            num_keys = 1 + len(shards_of(info.peer, info.span.start, publication.level))
            table.bytes_received += STORING_BYTES * num_keys
            reader.published(table.model, publication)
            reader.spent(STORING_BYTES * num_keys)
            await reader.report(table.model, info)
        table.now += EVERY
        if step == int(60 / EVERY) - 1:
            first = table.bytes_received - began
    total = table.bytes_received - began
    known = await reader.servers(table.model)
    return Reading(first, (total - first) / (minutes - 1), (table.num_keys - keys) / minutes, known, histogram)


def route_seconds(known: Sequence[ServerInfo], num_blocks: int) -> float:
    """The CPU time of a route over what a client keeps; the median of several."""
    rng = random.Random(3)
    kept = keep(known, {}, num_blocks=num_blocks, rng=rng)
    round_trips = {each.peer: rng.uniform(0.002, 0.2) for each in kept if rng.random() < 0.3}
    seconds = []
    for _ in range(7):
        rng.shuffle(kept)
        view = SwarmView(num_blocks, tuple(kept))
        began = time.thread_time()
        choose_route(view, Span(0, num_blocks), needs=Needs(num_steps=100), known=Measured(round_trips))
        seconds.append(time.thread_time() - began)
    return statistics.median(seconds)


def placement_seconds(histogram: Histogram, num_blocks: int) -> float | None:
    """The CPU time in which a new server chooses its blocks; `None` without `shoal.policy.placement.joining`."""
    if importlib.util.find_spec("shoal.policy.placement.joining") is None:
        return None
    joining: Any = importlib.import_module("shoal.policy.placement.joining")
    machine = replace(histogram.machines[0], peer="new", span=None, count=1)
    began = time.thread_time()
    joining.choose_blocks(machine, histogram.machines, num_blocks, rng=random.Random(4))
    return time.thread_time() - began


def error_of(histogram: Histogram, infos: Sequence[ServerInfo], num_blocks: int) -> float:
    """The largest relative error in the number of holders of a block."""
    true = [sum(block in info.span for info in infos) for block in range(num_blocks)]
    found = histogram.holders(num_blocks)
    return max(abs(one - other) / max(other, 1) for one, other in zip(found, true, strict=True))


def measure(number: int, num_blocks: int, minutes: int) -> dict[str, float | None]:
    model = ModelInfo("llama-80x8192-0123456789abcdef", "meta-llama/Llama-3.3-70B-Instruct", "llama", num_blocks)
    identities, infos = make_servers(number, num_blocks, seed=number)
    print(f"{number} servers: signing their records", file=sys.stderr)
    table = make_table(identities, infos, model)
    record = statistics.mean(len(each) for key in table.shards.values() for each in key)
    print(f"{number} servers: reading for {minutes} minutes", file=sys.stderr)
    client = asyncio.run(read_as_client(table, minutes))
    server = asyncio.run(read_as_server(table, infos[0], minutes))
    assert server.histogram is not None
    return {
        "servers": number,
        "record_bytes": record,
        "client_first": client.first,
        "client_later": client.later,
        "client_keys": client.keys,
        "client_knows": len(client.known),
        "server_first": server.first,
        "server_later": server.later,
        "server_keys": server.keys,
        "largest_key": table.largest_key,
        "histogram_error": error_of(server.histogram, infos, num_blocks),
        "route_seconds": route_seconds(client.known, num_blocks),
        "placement_seconds": placement_seconds(server.histogram, num_blocks),
    }


async def measure_routing(number: int) -> dict[str, float]:
    """The bytes of reading and storing one key, without records, among `number` real nodes."""
    from contextlib import AsyncExitStack

    from shoal.net import NetworkConfig, join

    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(join(NetworkConfig(host="127.0.0.1")))
        peers = first.transport.addresses
        for _ in range(number - 1):
            await stack.enter_async_context(join(NetworkConfig(host="127.0.0.1", initial_peers=peers)))
        config = NetworkConfig(initial_peers=peers, client_mode=True)
        client: Any = (await stack.enter_async_context(join(config))).directory
        before = client.bytes_received
        model = ModelInfo("none", "none", "none", 80)
        await client.servers(model)
        return {"nodes": number, "bytes_of_a_key": (client.bytes_received - before) / num_buckets(80)}


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--routing", type=int, metavar="NODES", help="measure the bytes of finding a key")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.routing:
        print(json.dumps(asyncio.run(measure_routing(arguments.routing))))
        return
    rows = [measure(number, arguments.blocks, arguments.minutes) for number in arguments.servers]
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "blocks": arguments.blocks, "rows": rows}, indent=2))
        return
    print(f"{describe_machine()}; {arguments.blocks} blocks\n")
    print(
        "| servers | record, B | client, MB a minute (first) | knows | server, MB a minute (first) | largest key, KiB "
        "| error of the histogram | route, ms | placement, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        values = {key: value or 0.0 for key, value in row.items()}
        placement = "-" if row["placement_seconds"] is None else f"{values['placement_seconds'] * 1e3:.0f}"
        print(
            f"| {values['servers']:,} | {values['record_bytes']:.0f} "
            f"| {values['client_later'] / 1e6:.2f} ({values['client_first'] / 1e6:.2f}) | {values['client_knows']:,} "
            f"| {values['server_later'] / 1e6:.2f} ({values['server_first'] / 1e6:.2f}) "
            f"| {values['largest_key'] / 1024:.0f} | {values['histogram_error']:.0%} "
            f"| {values['route_seconds'] * 1e3:.0f} | {placement} |"
        )


if __name__ == "__main__":
    main()
