"""Which texts have passes of a draft together: where that costs less than apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.speculation.shared_passes import ModelSize, Reading, cost, share_passes

SMALL = ModelSize(weights=134_500_000, num_layers=30, kept=11_520)
"""SmolLM2-135M."""
TINY = ModelSize(weights=836_544, num_layers=2, kept=256)
"""The bundled draft."""

readings = st.builds(
    lambda length, num_new, count: Reading(length, min(num_new, length), count),
    st.integers(1, 40_000),
    st.integers(1, 32),
    st.integers(1, 64),
)


def total(model: ModelSize, texts: list[Reading], groups: list[list[int]]) -> float:
    return sum(cost(model, [texts[each] for each in group]) for group in groups)


@given(st.sampled_from([SMALL, TINY]), st.lists(readings, max_size=12))
def test_each_text_is_in_one_group_and_all_cost_no_more_than_alone(model: ModelSize, texts: list[Reading]):
    groups = share_passes(model, texts)
    assert sorted(index for group in groups for index in group) == list(range(len(texts)))
    assert total(model, texts, groups) <= 1.000001 * total(model, texts, [[index] for index in range(len(texts))])


def test_texts_of_like_lengths_are_together_and_one_that_is_much_longer_is_not():
    texts = [Reading(300 + 40 * index, 2, 4) for index in range(8)]
    assert sorted(share_passes(SMALL, texts)[0]) == list(range(8))
    groups = share_passes(SMALL, [*texts, Reading(30_000, 2, 4)])
    assert [sorted(group) for group in groups] == [[8], list(range(8))]


def test_a_text_that_has_much_to_read_reads_it_alone():
    texts = [*(Reading(300, 1, 2) for _ in range(8)), Reading(300, 32, 2)]
    assert [8] in share_passes(SMALL, texts)


def test_where_a_pass_is_mostly_overhead_all_texts_are_together():
    texts = [Reading(length, 2, 3) for length in (20, 100, 300, 700)]
    assert len(share_passes(TINY, texts)) == 1


def test_nothing_is_shared_by_nobody():
    assert share_passes(SMALL, []) == []
    assert share_passes(SMALL, [Reading(5, 1, 1)]) == [[0]]
