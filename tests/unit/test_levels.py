"""Where records are kept: the shards of a bucket, and the level that follows the number of its servers."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.census.levels import (
    FEWEST,
    MAX_LEVEL,
    MOST,
    NUM_REPORTERS,
    REPORT_SECONDS,
    Shard,
    is_sampled,
    level_for,
    num_buckets,
    reading_level,
    reporters,
    shard_of,
    shards_at,
    shards_of,
    stretch,
)

names = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=20)
levels = st.integers(0, MAX_LEVEL)


def peers(number: int) -> list[str]:
    return [f"peer {index}" for index in range(number)]


@given(names, st.integers(0, 4000), levels)
def test_a_record_is_kept_once_or_twice_and_sometimes_in_the_front(peer: str, start: int, level: int):
    shards = shards_of(peer, start, level)
    assert len(set(shards)) == len(shards) <= 3
    assert {shard.bucket for shard in shards} == {start // 8}
    assert shards[0] == shard_of(peer, start // 8, level)
    assert {shard.level for shard in shards} - {0} == {level, level - 1} - {0, -1}


@given(names, st.integers(0, 500), levels)
def test_each_shard_is_cut_in_two_at_the_next_level(peer: str, bucket: int, level: int):
    shard = shard_of(peer, bucket, level)
    assert shard in shards_at(bucket, level)
    if level < MAX_LEVEL:
        assert shard_of(peer, bucket, level + 1).index // 2 == shard.index


def test_shards_have_about_the_same_number_of_servers():
    sizes = Counter(shard_of(peer, 3, 4) for peer in peers(1600))
    assert set(sizes) == set(shards_at(3, 4))
    assert 60 <= min(sizes.values()) <= max(sizes.values()) <= 145


def test_the_front_of_a_crowded_bucket_has_a_sample_that_is_no_larger_than_a_shard():
    for level in range(1, MAX_LEVEL + 1):
        number = MOST << level
        in_front = sum(Shard(0, 0, 0) in shards_of(peer, 0, level) for peer in peers(number))
        assert MOST <= in_front <= 3 * MOST


def test_being_sampled_does_not_depend_on_the_shard():
    sampled = [peer for peer in peers(20_000) if is_sampled(peer, 4)]
    assert 1000 <= len(sampled) <= 1500
    assert len({shard_of(peer, 0, 4) for peer in sampled}) == 16


@given(st.floats(0, 1e7), st.none() | levels)
def test_a_level_suits_the_number_of_servers_and_then_stays(count: float, current: int | None):
    level = level_for(count, current)
    assert level == MAX_LEVEL or count <= MOST << level
    assert level == 0 or count >= FEWEST << level
    assert level_for(count, level) == level


@given(st.lists(st.floats(0.8, 1.25), max_size=30), st.floats(1, 10_000))
def test_estimates_that_differ_by_a_quarter_do_not_change_the_level_to_and_fro(noise: list[float], count: float):
    level, changes = level_for(count, None), 0
    for factor in noise:
        after = level_for(count * factor, level)
        changes, level = changes + (after != level), after
    assert changes <= 1


def test_while_a_swarm_grows_all_servers_use_two_neighboring_levels():
    """They read at different times, so their estimates differ; a reader sees all of them at one level."""
    rng, used = random.Random(0), list[int]()
    for count in [*range(1, 2000, 10), *range(2000, 1, -10)]:
        used = [level_for(count * rng.uniform(0.95, 1.05), level) for level in used[:count]]
        usual = Counter(used).most_common(1)[0][0] if used else None
        used += [level_for(count * rng.uniform(0.95, 1.05), usual) for _ in range(count - len(used))]
        votes = Counter(used)
        assert max(votes) - min(votes) <= 1
        level = reading_level(votes)
        assert votes[level] + votes[level + 1] == count


@given(st.dictionaries(levels, st.integers(0, 500)), st.sets(levels))
def test_readers_look_where_most_servers_publish(votes: dict[int, int], refuted: set[int]):
    level = reading_level(votes, refuted)
    seen = votes.get(level, 0) + votes.get(level + 1, 0)
    others = (each for each in range(MAX_LEVEL + 1) if each not in refuted)
    assert all(votes.get(each, 0) + votes.get(each + 1, 0) <= seen for each in others)
    assert level == 0 or level not in refuted


def test_a_reader_that_knows_nothing_begins_in_the_front():
    assert reading_level({}) == 0


def test_the_turn_to_report_on_a_shard_goes_around():
    everybody = peers(60)
    turns = [reporters(everybody, now=index * REPORT_SECONDS) for index in range(40)]
    assert all(len(set(turn)) == NUM_REPORTERS for turn in turns)
    assert len({peer for turn in turns for peer in turn}) > 40
    assert set(reporters(everybody[:2], now=0.0)) == set(everybody[:2])


def test_records_live_longer_in_larger_swarms_and_as_before_in_small_ones():
    assert stretch(0) == stretch(80) == 1.0
    assert stretch(160) == 2.0
    assert stretch(10_000) == stretch(1e9) == 5.0


def test_buckets_cover_all_blocks():
    assert [num_buckets(blocks) for blocks in (1, 8, 9, 80, 126)] == [1, 1, 2, 10, 16]
