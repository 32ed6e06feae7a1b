"""What a peer reads of a directory of any size, and what it knows afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count, islice

import pytest

from shoal.net.catalog import MOST_SHARDS, Catalog, Listing
from shoal.peers import ServerInfo, ServerState
from shoal.policy.census.levels import MAX_LEVEL, Shard, level_for, shards_of

from .test_routing import server

NUM_BLOCKS = 32
LIFETIME = 300.0
EVERY = 30.0


class Table:
    """A directory of servers, each with the level at which it publishes. It counts the records that are read."""

    def __init__(self) -> None:
        self.listings: dict[str, Listing] = {}
        self.num_read = 0
        self._num_added = 0

    def add(self, infos: Iterable[ServerInfo], *, level: int, now: float = 0.0, lifetime: float = LIFETIME) -> None:
        for info in infos:
            self._num_added += 1
            self.listings[info.peer] = Listing(info, level, now + lifetime, self._num_added)

    def read(self, shards: Sequence[Shard]) -> dict[Shard, list[Listing]]:
        found: dict[Shard, list[Listing]] = {shard: [] for shard in shards}
        for listing in self.listings.values():
            for shard in shards_of(listing.info.peer, listing.info.span.start, listing.level):
                if shard in found:
                    found[shard].append(listing)
        self.num_read += sum(map(len, found.values()))
        return found


def crowd(number: int, *, start: int = 0, name: str = "s") -> list[ServerInfo]:
    return [server(f"{name}{index}", f"{start}:{start + 8}") for index in range(number)]


def in_front(number: int, level: int) -> list[ServerInfo]:
    """Identities that were chosen so that all of them are in the front if they claim this level."""
    names = (f"liar{index}" for index in count())
    chosen = (name for name in names if Shard(0, 0, 0) in shards_of(name, 0, level))
    return [server(name, "0:8") for name in islice(chosen, number)]


def catalog(*, most_whole: int = 1200) -> Catalog:
    return Catalog(NUM_BLOCKS, random.Random(0), most_whole=most_whole)


def read(reader: Catalog, table: Table, *, now: float, most: int = 2) -> None:
    """One read, as a `Participant` makes it."""
    for _ in range(3):
        reader.take(table.read(reader.plan(now=now, most=most)), now=now)
        if not reader.is_behind(now):
            break


def known(reader: Catalog, now: float) -> set[str]:
    return {each.peer for each in reader.servers(now=now)}


@pytest.mark.parametrize("number", [0, 1, 60, 150, 250])
def test_a_small_swarm_is_read_whole_at_once_and_a_new_server_is_seen_in_the_next_read(number: int):
    table, reader = Table(), catalog()
    for start in range(0, NUM_BLOCKS, 8):
        infos = crowd(number, start=start, name=f"s{start}-")
        table.add(infos, level=level_for(number, None))
    read(reader, table, now=0.0)
    assert known(reader, 0.0) == set(table.listings)
    assert reader.is_small(0.0)
    table.add([server("new", "3:9")], level=level_for(number, None), now=10.0)
    read(reader, table, now=10.0)
    assert "new" in known(reader, 10.0)


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.5, 0.5), (0.03, 0.97)])
@pytest.mark.parametrize("level", range(3))
def test_while_servers_change_their_level_a_reader_sees_all_of_them(level: int, shares: tuple[float, float]):
    table, reader, infos = Table(), catalog(), crowd(200)
    cut = round(shares[0] * len(infos))
    table.add(infos[:cut], level=level)
    table.add(infos[cut:], level=level + 1)
    read(reader, table, now=0.0)
    assert known(reader, 0.0) == set(table.listings)


def test_of_a_large_swarm_each_read_takes_a_part_and_after_some_all_was_read():
    table, reader = Table(), catalog()
    for start in range(0, NUM_BLOCKS, 8):
        table.add(crowd(1000, start=start, name=f"s{start}-"), level=4, lifetime=1e6)
    read(reader, table, now=0.0)
    first = table.num_read
    assert 200 <= first <= 1000, "the front has a sample"
    assert not reader.is_small(0.0)
    assert 2000 <= reader.total(0.0) <= 8000
    sizes = []
    for index in range(1, 40):
        before = table.num_read
        read(reader, table, now=index * EVERY)
        sizes.append(table.num_read - before)
    assert max(sizes) <= 400
    assert known(reader, 40 * EVERY) == set(table.listings)
    assert 3600 <= reader.total(40 * EVERY) <= 4400


def test_the_sample_is_random():
    """The servers of every thousandth digest are known as often as all others."""
    table, reader = Table(), catalog()
    table.add(crowd(4000), level=6, lifetime=1e6)
    for index in range(6):
        read(reader, table, now=index * EVERY, most=1)
    numbers = [int(peer[1:]) for peer in known(reader, 0.0)]
    assert 200 <= len(numbers) <= 1500
    assert 0.4 <= sum(number < 2000 for number in numbers) / len(numbers) <= 0.6


def test_a_writer_follows_the_number_of_servers_in_its_bucket():
    table, reader = Table(), catalog()
    assert reader.writing_level(3, None, now=0.0) == 0
    table.add(crowd(60), level=0)
    read(reader, table, now=0.0)
    assert reader.writing_level(3, 0, now=0.0) == 0
    table.add(crowd(100), level=0)
    read(reader, table, now=1.0)
    assert reader.writing_level(3, 0, now=1.0) == 2
    assert reader.writing_level(9, 0, now=1.0) == 0, "another bucket"
    assert reader.writing_level(3, None, now=1.0) == 2, "all others are at a level that is too low"


def test_a_new_writer_joins_the_level_of_the_others():
    table, reader = Table(), catalog()
    table.add(crowd(800), level=5)
    for index in range(4):
        read(reader, table, now=index * EVERY)
    assert reader.writing_level(0, None, now=100.0) == 5
    assert level_for(800, None) == 5
    assert reader.writing_level(0, 4, now=100.0) == 4, "a level that is good enough"


def test_servers_lower_their_level_when_most_have_left():
    table, reader = Table(), catalog()
    table.add(crowd(30), level=5, lifetime=1e6)
    for index in range(6):
        read(reader, table, now=index * EVERY)
    assert reader.writing_level(0, 5, now=180.0) <= 1


@pytest.mark.parametrize("claimed", [0, 2, MAX_LEVEL])
def test_those_who_claim_another_level_do_not_mislead_a_reader_for_long(claimed: int):
    """A thousand identities, chosen so that all of them are in the front, publish at a level of their choice."""
    table, reader = Table(), catalog(most_whole=400)
    honest = crowd(1000)
    table.add(honest, level=4, lifetime=1e6)
    table.add(in_front(1000, claimed), level=claimed, lifetime=1e6)
    for index in range(40):
        read(reader, table, now=index * EVERY)
    honest_known = known(reader, 1200.0) & {each.peer for each in honest}
    assert len(honest_known) >= 600
    assert abs(reader.writing_level(0, 4, now=1200.0) - 4) <= 1


def test_what_is_missed_is_searched_for_bucket_by_bucket():
    table, reader = Table(), catalog(most_whole=400)
    table.add(crowd(3000, start=0), level=6)
    table.add(crowd(3000, start=8, name="t"), level=6)
    table.add([server("long", "2:20")], level=6)
    read(reader, table, now=0.0)
    rounds = 0
    for shards in reader.search([17], now=0.0):
        assert len(shards) <= MOST_SHARDS
        reader.take(table.read(shards), now=0.0)
        rounds += 1
    assert "long" in known(reader, 0.0)
    assert rounds == 3, "buckets 2, 1 and 0"
    assert not list(reader.search([], now=0.0))


def test_a_search_ends_with_the_first_bucket_that_has_another_holder():
    table, reader = Table(), catalog(most_whole=400)
    table.add(crowd(3000, start=0), level=6)
    read(reader, table, now=0.0)
    before = known(reader, 0.0)
    for shards in reader.search([5], now=0.0):
        reader.take(table.read(shards), now=0.0)
    assert known(reader, 0.0) > before


def test_an_announcement_is_valid_until_it_expires_even_if_reads_miss_it():
    table, reader = Table(), catalog()
    table.add([server("one", "0:8")], level=0, lifetime=60.0)
    read(reader, table, now=0.0)
    table.listings.clear()
    read(reader, table, now=59.0)
    assert known(reader, 59.0) == {"one"}
    assert known(reader, 60.0) == set()


def test_the_latest_announcement_counts_in_any_order_of_arrival():
    info, front = server("one", "0:8"), Shard(0, 0, 0)
    goodbye = Listing(replace(info, state=ServerState.LEAVING), 0, 61.0, version=61.0)
    reader = catalog()
    reader.take({front: [Listing(info, 0, 60.0, version=60.0), goodbye]}, now=0.0)
    reader.take({front: [Listing(info, 0, 60.0, version=60.0)]}, now=0.0)
    assert [each.state for each in reader.servers(now=0.0)] == [ServerState.LEAVING]
    reader.take({front: [Listing(info, 0, 62.0, version=62.0)]}, now=0.0)
    assert [each.state for each in reader.servers(now=0.0)] == [ServerState.ONLINE]


def test_a_shard_that_could_not_be_read_does_not_count_as_empty():
    table, reader = Table(), catalog()
    table.add(crowd(60), level=0)
    read(reader, table, now=0.0)
    reader.take({}, now=1.0)
    assert reader.num_servers(0, now=1.0) == 60
