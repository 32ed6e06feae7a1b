"""Which sequences of different lengths are computed together."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.batching.length_groups import length_groups
from shoal.policy.batching.snapshots import MAX_SNAPSHOTS, MIN_INTERVAL, keeps_snapshot, tokens_to_snapshot


def cost(groups: list[list[int]], lengths: list[int], fixed_cost: float) -> float:
    return sum(fixed_cost + len(group) * max(lengths[index] for index in group) for group in groups)


def all_partitions(items: list[int]) -> list[list[list[int]]]:
    if not items:
        return [[]]
    first, *rest = items
    found = []
    for partition in all_partitions(rest):
        found.append([[first], *partition])
        found += [[*partition[:at], [first, *partition[at]], *partition[at + 1 :]] for at in range(len(partition))]
    return found


@given(lengths=st.lists(st.integers(1, 1000), max_size=6), fixed_cost=st.sampled_from([0.0, 50.0, 300.0, 5000.0]))
def test_no_other_groups_cost_less(lengths: list[int], fixed_cost: float) -> None:
    groups = length_groups(lengths, fixed_cost)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    least = min(cost(each, lengths, fixed_cost) for each in all_partitions(list(range(len(lengths)))))
    assert cost(groups, lengths, fixed_cost) == pytest.approx(least)


def test_one_long_sequence_does_not_make_the_others_long() -> None:
    assert length_groups([100, 8000, 120, 90], fixed_cost=2000) == [[3, 0, 2], [1]]
    assert length_groups([100, 8000, 120, 90], fixed_cost=50_000) == [[3, 0, 2, 1]]


@given(num_tokens=st.integers(1, 100_000))
def test_a_prompt_is_computed_in_few_parts_and_the_states_after_each_but_the_last_are_kept(num_tokens: int) -> None:
    position, ends = 0, []
    while position < num_tokens:
        position += min(num_tokens - position, tokens_to_snapshot(position, num_tokens))
        ends.append(position)
    assert len(ends) <= MAX_SNAPSHOTS + 1
    room = {"num_pages": 100, "num_available": 100, "needed": 10}
    assert all(keeps_snapshot(end, **room) for end in ends[:-1])
    assert all(end % MIN_INTERVAL == 0 for end in ends[:-1])


def test_no_states_are_kept_where_pages_are_short() -> None:
    assert keeps_snapshot(MIN_INTERVAL, num_pages=80, num_available=20, needed=10)
    assert not keeps_snapshot(MIN_INTERVAL, num_pages=80, num_available=19, needed=10)
    assert not keeps_snapshot(MIN_INTERVAL + 16, num_pages=80, num_available=80, needed=10)
    assert not keeps_snapshot(0, num_pages=80, num_available=80, needed=10)
