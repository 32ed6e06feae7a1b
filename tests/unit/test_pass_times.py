"""What passes take is learnt, and a prompt's parts are as large as there is time for."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_times import (
    MIN_PREFILL_TOKENS,
    Cost,
    PassLoad,
    PassTimeModel,
    PrefillBudget,
)
from shoal.policy.batching.scheduling import RequestView, prefill_budget, schedule

seconds = st.floats(1e-6, 10)
costs = st.builds(Cost, seconds, st.floats(0, 1e-2))
models = st.builds(PassTimeModel, seconds, costs, costs)
contexts = st.integers(0, 1 << 17)
DECODE_SECONDS, TOKEN_SECONDS = 0.05, 0.0015
MEASURED = PassTimeModel.measured(decode_seconds=DECODE_SECONDS, prefill_token_seconds=TOKEN_SECONDS)


def part(num_tokens: int, num_past: int = 0, *, rows: int = 1, decodes: bool = False) -> PassLoad:
    return PassLoad.of(num_rows=rows, num_tokens=num_tokens, num_past=num_past, decodes=decodes)


def step(num_tokens: int, num_past: int, rows: int = 1) -> RequestView:
    return RequestView(rows, num_tokens, num_past > 0, lambda _: 0, num_past=num_past)


def test_each_token_of_a_prefill_sees_those_before_it_and_itself():
    assert part(3) == PassLoad(num_prefill=3, num_pairs=1 + 2 + 3)
    assert part(2, 10, rows=4) == PassLoad(num_prefill=8, num_pairs=4 * (11 + 12))


def test_a_decoding_session_reads_its_cache_once_however_many_guesses_are_checked():
    assert part(4, 100, rows=2, decodes=True) == PassLoad(num_decoding=2, num_read=2 * 104, num_decoded=8)


def test_a_pass_takes_what_its_parts_take():
    model = PassTimeModel(0.05, Cost(0.04, 1e-5), Cost(0.001, 1e-6))
    work = PassLoad.total([part(1, 999, decodes=True), part(1, 1999, decodes=True), part(2, 100), part(1, 50)])
    assert model.seconds_of(work) == pytest.approx(0.04 + 3000e-5 + 3e-3 + (101 + 102 + 51) * 1e-6)


@given(models, contexts, st.integers(1, 2000), st.integers(1, 64), st.integers(1, 5000))
def test_more_tokens_and_longer_contexts_never_take_less(model, num_past, num_tokens, rows, more):
    least = model.seconds_of(part(num_tokens, num_past, rows=rows))
    grown = [
        part(num_tokens + more, num_past, rows=rows),
        part(num_tokens, num_past + more, rows=rows),
        PassLoad.total([part(num_tokens, num_past, rows=rows), part(1, more, decodes=True)]),
    ]
    assert all(model.seconds_of(each) >= least * (1 - 1e-12) for each in grown)


@given(costs, seconds, seconds, contexts, st.integers(1, 32), st.integers(0, 5000))
def test_a_part_is_smaller_behind_a_longer_context_and_larger_with_more_time(token, time, more, past, rows, longer):
    budget = PrefillBudget(time, token)
    num_tokens = budget.num_tokens(num_rows=rows, num_past=past)
    assert budget.num_tokens(num_rows=rows, num_past=past + longer) <= num_tokens
    assert budget.num_tokens(num_rows=rows + 1, num_past=past) <= num_tokens
    assert PrefillBudget(time + more, token).num_tokens(num_rows=rows, num_past=past) >= num_tokens


@given(costs, seconds, contexts, st.integers(1, 32))
@example(Cost(1.0), 7.0, 0, 1)
def test_a_part_takes_all_of_the_time_that_there_is_and_no_more(token, time, past, rows):
    budget = PrefillBudget(time, token, is_untouched=False)
    num_tokens = budget.num_tokens(num_rows=rows, num_past=past)
    left = budget.without(num_rows=rows, num_tokens=num_tokens, num_past=past)
    one_more = budget.without(num_rows=rows, num_tokens=num_tokens + 1, num_past=past)
    assert left.seconds >= -1e-6 * time
    assert one_more.seconds <= 1e-6 * time


@given(
    models,
    st.floats(0, 0.95),
    st.lists(st.builds(step, st.integers(1, 8), st.integers(1, 1 << 17), st.integers(1, 3)), min_size=1, max_size=8),
    st.lists(st.builds(step, st.integers(9, 5000), contexts, st.integers(1, 3)), min_size=1, max_size=4),
)
def test_prefills_beside_those_who_decode_stay_within_their_share_unless_they_are_one_page(
    model, share, deciding, prompts
):
    limits, requests = Limits(prefill=share, max_num_batched_tokens=1 << 20), [*deciding, *prompts]
    budget = prefill_budget(model, requests, limits=limits, is_decoding=True)
    chosen = schedule(requests, num_free_pages=0, max_num_batched_tokens=1 << 20, prefill=budget).chunks
    work = PassLoad.total(requests[index].work(num_tokens) for index, num_tokens in chosen)
    without = model.seconds_of(PassLoad(work.num_decoding, work.num_read))
    assert work.num_decoding == sum(each.num_rows for each in deciding)
    assert work.num_prefill > 0
    if work.num_prefill > MIN_PREFILL_TOKENS:
        assert model.seconds_of(work) * (1 - share) <= without * (1 + 1e-6)


def test_what_decoding_sessions_read_is_part_of_what_their_pass_takes():
    model = PassTimeModel(DECODE_SECONDS, Cost(DECODE_SECONDS, 1e-5), Cost(TOKEN_SECONDS))
    few, much = (model.beside(part(1, past, decodes=True), share=0.5) for past in (100, 30_000))
    assert few.seconds == pytest.approx(0.05 + 101e-5)
    assert much.seconds == pytest.approx(0.05 + 30_001e-5)
    assert model.beside(PassLoad(), share=0.5).seconds == DECODE_SECONDS


def test_a_prompt_that_is_computed_alone_is_cut_to_what_the_largest_pass_takes():
    budget = PassTimeModel(1.0, Cost(1.0), Cost(0.001, 1e-6)).alone(max_num_batched_tokens=1024)
    sizes = [budget.num_tokens(num_rows=1, num_past=past) for past in (0, 1024, 8192, 131_072)]
    assert sizes[0] == 1024
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 20


@given(st.lists(st.tuples(st.sampled_from([0, 5, 32, 500]), contexts, st.floats(0, 10)), max_size=60))
def test_what_is_learnt_stays_positive_and_within_what_was_seen(passes):
    model = MEASURED
    for num_tokens, past, took in passes:
        model = model.learnt(part(num_tokens, past) if num_tokens else part(1, past, decodes=True), took)
    assert 0 < model.decode_seconds <= 10
    assert model.decoding.fixed > 0
    assert model.prefill_token.fixed > 0
    assert min(model.decoding.each, model.prefill_token.each) >= 0
    assert model.beside(PassLoad(), share=0.5).num_tokens(num_rows=1, num_past=0) >= MIN_PREFILL_TOKENS


def passes_of(
    truth: PassTimeModel, *, noise: float, stalls: float, chance: random.Random, rounds: int
) -> PassTimeModel:
    """What is learnt from prompts of all lengths beside sessions that decode."""
    model = MEASURED
    for _ in range(rounds):
        decoding = part(1, chance.randrange(40_000), rows=chance.randint(1, 3), decodes=True)
        past = int(2 ** chance.uniform(0, 15))
        work = PassLoad.total([decoding, part(chance.randint(16, 256), past)])
        for each in (work, decoding):
            factor = chance.uniform(1 - noise, 1 + noise) * (30 if chance.random() < stalls else 1)
            model = model.learnt(each, truth.seconds_of(each) * factor)
    return model


TRUE_COSTS = [Cost(0.0015, 6e-7), Cost(0.0015, 0.0), Cost(0.004, 1e-5), Cost(0.0003, 1e-8)]


@pytest.mark.parametrize("token", TRUE_COSTS, ids=str)
def test_the_true_costs_are_found_however_many_tokens_are_seen(token: Cost):
    truth = PassTimeModel(0.05, Cost(0.03, 2e-6), token)
    model = passes_of(truth, noise=0.0, stalls=0.0, chance=random.Random(1), rounds=2000)
    for past in (0, 500, 4000, 32_000):
        assert model.prefill_token.at(past) == pytest.approx(token.at(past), rel=0.02)
        assert model.decoding.at(past) == pytest.approx(truth.decoding.at(past), rel=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_passes_that_stall_and_vary_hardly_change_what_is_expected(seed: int):
    truth = PassTimeModel(0.05, Cost(0.03, 2e-6), Cost(0.0015, 6e-7))
    model = passes_of(truth, noise=0.2, stalls=0.03, chance=random.Random(seed), rounds=1000)
    for past in (0, 500, 4000, 32_000):
        assert truth.prefill_token.at(past) == pytest.approx(model.prefill_token.at(past), rel=0.5)


def test_one_pass_that_stalls_changes_what_is_expected_by_a_fifth_at_most():
    for past in (0, 500, 4000, 32_000):
        changed = MEASURED.learnt(part(100, past), 1000.0)
        assert changed.seconds_of(part(100, past)) <= 1.2 * MEASURED.seconds_of(part(100, past)) + 1e-9


def test_a_prompt_of_one_length_does_not_unlearn_the_costs_of_another():
    truth = PassTimeModel(0.05, Cost(0.05), Cost(0.0015, 6e-7))
    slower = PassTimeModel(0.05, Cost(0.05), Cost(0.0030, 12e-7))
    model = truth
    for _ in range(1000):
        model = model.learnt(part(64, 30_000), slower.seconds_of(part(64, 30_000)))
    assert model.prefill_token.at(30_000) == pytest.approx(2 * truth.prefill_token.at(30_000), rel=0.01)
    assert model.prefill_token.at(0) <= 1.3 * truth.prefill_token.at(0)


def test_the_parts_of_a_first_long_prompt_take_little_longer_than_they_may():
    truth = PassTimeModel(0.2, Cost(0.2), Cost(TOKEN_SECONDS, 6e-7))
    model = PassTimeModel.measured(decode_seconds=0.2, prefill_token_seconds=TOKEN_SECONDS)
    past, decoding, worst = 0, part(1, 100, rows=8, decodes=True), 0.0
    while past < 16_384:
        num_tokens = model.beside(decoding, share=0.5).num_tokens(num_rows=1, num_past=past)
        work = PassLoad.total([decoding, part(num_tokens, past)])
        worst = max(worst, truth.seconds_of(work))
        model = model.learnt(work, truth.seconds_of(work))
        past += num_tokens
    assert worst <= 1.25 * 2 * truth.decode_seconds


def test_too_few_prefill_tokens_to_be_timed_teach_nothing():
    assert MEASURED.learnt(part(MIN_PREFILL_TOKENS - 1), 10.0) == MEASURED
