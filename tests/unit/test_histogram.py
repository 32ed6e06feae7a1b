"""What placement learns of a swarm that no server can read whole, and what liars achieve."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.net.catalog import Catalog, Listing
from shoal.net.tally_book import Report, TallyBook
from shoal.peers import Capacity, ServerInfo, ServerState
from shoal.policy.census.histogram import (
    Cell,
    Histogram,
    agrees,
    assemble,
    histogram_of,
    middle,
    shortened,
    tally_of,
)
from shoal.policy.census.levels import Shard, reporters, shard_of, shards_at
from shoal.spans import Span

from .test_routing import server

NUM_BLOCKS, LEVEL = 8, 4


def machine(peer: str, span: str, *, speed: float = 1000.0, pinned: bool = False) -> ServerInfo:
    capacity = Capacity(8, ((1, 2 * speed), (8, speed)), 5000.0, 2.0, 1.0)
    return replace(server(peer, span), capacity=capacity, pinned=pinned)


def crowd(number: int, seed: int = 0) -> list[ServerInfo]:
    rng = random.Random(seed)
    spans = [f"{start}:{rng.randint(start + 1, 8)}" for start in (rng.randrange(8) for _ in range(number))]
    return [machine(f"s{index}", span, pinned=index % 4 == 0) for index, span in enumerate(spans)]


def spans_of(histogram: Histogram) -> dict[Span, int]:
    found: dict[Span, int] = {}
    for each in histogram.machines:
        assert each.span is not None
        found[each.span] = found.get(each.span, 0) + each.count
    return found


@given(st.integers(0, 80), st.integers(0, 100))
def test_a_tally_counts_every_server_and_keeps_those_that_may_move(number: int, seed: int):
    servers = crowd(number, seed)
    tally = tally_of(servers, now=0.0)
    assert sum(cell.count for cell in tally) == number
    assert sum(cell.movable for cell in tally) == sum(not each.pinned for each in servers)
    assert len({cell.span for cell in tally}) == len(tally)
    short = shortened(tally, 10)
    assert len(short) <= 10
    assert sum(cell.count for cell in short) == number
    assert all(0 <= cell.movable <= cell.count for cell in short)
    machines = [each for cell in tally for each in cell.machines()]
    assert sum(each.count for each in machines) == number
    assert sum(each.count for each in machines if each.movable) == sum(not each.pinned for each in servers)


def test_a_machine_of_a_histogram_is_as_fast_as_the_servers_are_on_average():
    tally = tally_of([machine("a", "0:8", speed=1000.0), machine("b", "0:8", speed=3000.0)], now=0.0)
    (found,) = tally[0].machines()
    assert found.block_speed(8) == 2000.0
    assert found.block_speed(1) == 4000.0
    assert (found.network_speed, found.load_seconds, found.max_blocks, found.count) == (5000.0, 2.0, 8, 2)


def test_a_tally_leaves_those_out_that_leave():
    gone = replace(machine("a", "0:8"), state=ServerState.LEAVING)
    assert tally_of([gone], now=0.0) == ()


def test_of_three_reports_one_lie_does_not_count():
    true = tally_of(crowd(60), now=0.0)
    everything = tuple(replace(cell, count=500, movable=500, block_speed=1e9) for cell in true)
    invented = (Cell(Span(0, 8), 500, 500, 8, 1e9, 1e9, 1e9, 1.0),)
    for lie in everything, invented, ():
        assert middle([true, lie, true]) == true
        assert middle([lie, true, true]) == true


@given(st.integers(20, 100), st.integers(0, 50))
def test_a_report_of_a_few_minutes_ago_agrees_with_what_is_seen(number: int, seed: int):
    servers = crowd(number, seed)
    rng = random.Random(seed)
    later = [each for each in servers if rng.random() > 0.1] + crowd(number // 10, seed + 1)
    assert agrees(tally_of(servers, now=0.0), tally_of(later, now=0.0))


def test_reports_that_invent_or_hide_servers_or_speed_do_not_agree():
    seen = tally_of(crowd(60), now=0.0)
    assert not agrees(tuple(replace(cell, count=2 * cell.count) for cell in seen), seen)
    assert not agrees((), seen)
    assert not agrees(tuple(replace(cell, block_speed=3 * cell.block_speed) for cell in seen), seen)


def test_a_shard_that_claims_far_more_than_the_others_is_left_out():
    shards = {index: tally_of(crowd(40, index), now=0.0) for index in range(16)}
    true = assemble({0: shards}, num_shards={0: 16})
    liar = {3: tuple(replace(cell, count=30 * cell.count) for cell in shards[3])}
    lied = assemble({0: shards | liar}, num_shards={0: 16})
    assert abs(lied.num_servers - true.num_servers) <= 0.1 * true.num_servers


def test_shards_that_nobody_reports_count_like_the_others():
    shards = {index: tally_of(crowd(40, index), now=0.0) for index in range(16)}
    half = {index: tally for index, tally in shards.items() if index % 2}
    assert assemble({0: half}, num_shards={0: 16}).num_servers == pytest.approx(640, rel=0.1)
    assert assemble({0: {}}, num_shards={0: 16}) == Histogram((), exact=False)


def test_the_histogram_of_a_small_swarm_has_every_server():
    servers = crowd(50)
    found = histogram_of(servers, now=0.0)
    assert found.exact
    assert [each.peer for each in found.machines] == [each.peer for each in servers]
    assert found.holders(8) == [sum(block in each.span for each in servers) for block in range(8)]


class Scene:
    """A bucket of a thousand servers at one level, a reader one level below, and reports of those whose turn it is."""

    def __init__(self) -> None:
        self.servers = crowd(1000)
        self.catalog = Catalog(NUM_BLOCKS, random.Random(0), most_whole=400)
        self.book = TallyBook(NUM_BLOCKS)
        self.shards = shards_at(0, LEVEL - 1)

    def members(self, shard: Shard) -> list[ServerInfo]:
        return [each for each in self.servers if shard_of(each.peer, 0, LEVEL - 1) == shard]

    def read(self, shards: Sequence[Shard]) -> None:
        found = {shard: [Listing(each, LEVEL, 1e9, 1.0) for each in self.members(shard)] for shard in shards}
        self.catalog.take(found, now=0.0)
        for shard in shards:
            self.book.check(shard, self.members(shard), now=0.0)

    def report(self, lies: bool = False) -> None:
        """All reporters of all shards; with `lies`, two of three say that the first block has no holder."""
        reports = []
        for shard in self.shards:
            members = self.members(shard)
            for index, peer in enumerate(reporters([each.peer for each in members], now=0.0)):
                hidden = [each for each in members if not (lies and index and 0 in each.span)]
                reports.append(Report(peer, shard, tally_of(hidden, now=0.0), 1e9))
        self.book.take(0, reports, now=0.0)

    @property
    def histogram(self) -> Histogram:
        return self.book.histogram(self.catalog, now=0.0)


def test_the_reports_of_all_shards_make_a_histogram_of_all_servers():
    scene = Scene()
    scene.read(scene.shards[:3])
    scene.report()
    found = scene.histogram
    assert not found.exact
    assert spans_of(found) == spans_of(histogram_of(scene.servers, now=0.0))


def test_without_reports_the_histogram_is_estimated_from_the_shards_that_were_read():
    scene = Scene()
    scene.read(scene.shards[:5])
    assert scene.histogram.num_servers == pytest.approx(1000, rel=0.2)


def test_whose_report_contradicts_a_shard_that_was_read_is_not_believed_any_more():
    scene = Scene()
    scene.read(scene.shards[:1])
    scene.report(lies=True)
    honest = sum(0 in each.span for each in scene.servers)
    assert scene.histogram.holders(8)[0] < honest / 2
    scene.read(scene.shards)
    assert scene.histogram.holders(8)[0] == pytest.approx(honest, rel=0.05)
