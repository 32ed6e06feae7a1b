from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_times import MIN_PREFILL_TOKENS, Cost, PassTimeModel, PrefillBudget
from shoal.policy.batching.scheduling import (
    DECODE_TOKENS,
    LATE_SECONDS,
    RequestView,
    SchedulerOutput,
    batching_delay,
    is_training_due,
    prefill_budget,
    schedule,
    seconds_to_next,
    shortest_prefill_seconds,
)
from shoal.policy.batching.session_times import Rhythm

PAGE = 16


def requests(
    num_tokens: int, *, rows: int = 1, running: bool = True, held: int = 0, unsplittable: bool = False
) -> RequestView:
    """A step of a session that has room for `held` more tokens of each row."""
    return RequestView(
        rows, num_tokens, running, lambda tokens: rows * max(0, -(-(tokens - held) // PAGE)), unsplittable
    )


def beginner(num_tokens: int, *, rows: int = 1, unsplittable: bool = False) -> RequestView:
    return requests(num_tokens, rows=rows, running=False, unsplittable=unsplittable)


def plan(*steps: RequestView, pages: int = 1000, tokens: int = 1024, prefill: int = 64) -> SchedulerOutput:
    budget = PrefillBudget(float(prefill), Cost(1.0))  # a second for each token
    return schedule(steps, num_free_pages=pages, max_num_batched_tokens=tokens, prefill=budget)


steps = st.builds(
    requests,
    st.integers(1, 200),
    rows=st.integers(1, 12),
    running=st.booleans(),
    held=st.integers(0, 20),
    unsplittable=st.booleans(),
)


def test_without_requests_nothing_is_computed():
    assert plan() == SchedulerOutput()


@given(st.lists(steps, max_size=12), st.integers(0, 60), st.integers(1, 128), st.integers(1, 64))
def test_a_pass_never_exceeds_its_budgets_except_for_one_large_request(steps, pages, tokens, prefill):
    chosen = plan(*steps, pages=pages, tokens=tokens, prefill=prefill).chunks
    sizes = [(steps[index], num_tokens, num_tokens * steps[index].num_rows) for index, num_tokens in chosen]
    assert all(1 <= num_tokens <= step.num_tokens for step, num_tokens, _ in sizes)
    assert len({index for index, _ in chosen}) == len(chosen)
    assert sum(step.num_pages(num_tokens) for step, num_tokens, _ in sizes) <= pages
    prefills = [size for step, _, size in sizes if not step.decodes]
    assert sum(prefills) <= max(prefill, MIN_PREFILL_TOKENS) or len(prefills) == 1
    small = all(num_tokens == 1 or step.unsplittable for step, num_tokens, _ in sizes if not step.decodes)
    assert sum(size for _, _, size in sizes) <= tokens or len(sizes) == 1 or (len(prefills) == 1 and small)
    assert all(num_tokens == step.num_tokens for step, num_tokens, _ in sizes if step.unsplittable)


def test_a_step_that_cannot_be_split_waits_for_a_pass_with_room_for_all_of_it():
    others, step = requests(1, rows=5), requests(2, unsplittable=True)
    assert plan(others, step, tokens=6).chunks == ((0, 1),)
    assert plan(others, step, tokens=7).chunks == ((0, 1), (1, 2))
    assert plan(step, others, tokens=1).chunks == ((0, 2),)


@given(st.lists(steps, min_size=1, max_size=12), st.integers(1, 128), st.integers(1, 64))
def test_while_there_are_pages_some_request_is_computed(steps, tokens, prefill):
    assert plan(*steps, pages=10_000, tokens=tokens, prefill=prefill).chunks


@given(st.lists(st.builds(requests, st.integers(1, DECODE_TOKENS), rows=st.integers(1, 4)), max_size=8), st.data())
def test_all_decoding_steps_are_in_every_pass(decoders, data):
    others = data.draw(st.lists(steps.filter(lambda step: not step.decodes), max_size=6))
    everyone = data.draw(st.permutations([*decoders, *others]))
    chosen = dict(plan(*everyone, pages=10_000).chunks)
    assert all(chosen.get(index) == step.num_tokens for index, step in enumerate(everyone) if step.decodes)


def test_a_prefill_takes_what_decoding_leaves_of_its_share():
    assert plan(beginner(500), requests(1), prefill=64).chunks == ((1, 1), (0, 64))
    assert plan(beginner(500), requests(8, rows=4), tokens=40).chunks == ((1, 8), (0, 8))
    assert plan(beginner(500), requests(8, rows=4), tokens=32).chunks == ((1, 8), (0, 1))


def test_prefills_are_computed_in_the_order_of_arrival():
    assert plan(beginner(50), requests(50), beginner(50), prefill=80).chunks == ((0, 50), (1, 30))


def test_a_batch_with_more_rows_than_there_is_room_gets_a_token_of_each():
    assert plan(beginner(9, rows=100), prefill=16, tokens=64).chunks == ((0, 1),)
    assert plan(beginner(9, rows=50), beginner(9), requests(1), prefill=16, tokens=64).chunks == ((2, 1), (0, 1))


def test_an_unsplittable_step_is_computed_in_one_pass():
    assert plan(beginner(90, unsplittable=True), requests(1), prefill=64).chunks == ((1, 1), (0, 90))
    assert plan(beginner(20), beginner(90, unsplittable=True), prefill=64).chunks == ((0, 20),)


def test_no_session_begins_before_an_earlier_one_that_waits_for_room():
    assert plan(beginner(100), beginner(10), pages=2).chunks == ()
    assert plan(beginner(30), beginner(100), beginner(10), pages=5).chunks == ((0, 30),)


def test_a_session_begins_only_with_room_for_its_whole_first_step():
    assert plan(beginner(64), pages=3, prefill=16).chunks == ()
    assert plan(beginner(64), pages=4, prefill=16).chunks == ((0, 16),)


def test_no_session_begins_with_pages_that_running_ones_need():
    assert plan(beginner(16), requests(64), pages=4, prefill=16).chunks == ((1, 16),)
    assert plan(beginner(16), requests(64), pages=5, prefill=32).chunks == ((0, 16), (1, 16))


@given(st.lists(steps, max_size=12), st.integers(0, 60), st.integers(1, 128), st.integers(1, 64))
def test_only_a_running_session_makes_others_give_up_their_pages(steps, pages, tokens, prefill):
    chosen = plan(*steps, pages=pages, tokens=tokens, prefill=prefill)
    alone = plan(*(step for step in steps if step.running), pages=pages, tokens=tokens, prefill=prefill)
    assert not chosen.short_of_pages or alone.short_of_pages
    assert not (chosen.short_of_pages and chosen.chunks)


@dataclass
class Client:
    """A session whose next step comes as soon as the last one is computed."""

    next_step: Callable[[], int]
    rows: int
    num_left: int = 0
    running: bool = False
    since: int = 0


clients = st.lists(st.tuples(st.sampled_from([1, 1, 3, 8, 9, 20]), st.integers(1, 20)), min_size=2, max_size=6)


@settings(max_examples=60)
@given(clients, st.integers(1, 64), st.integers(1, 32))
def test_no_request_starves_although_each_always_has_more(kinds, tokens, prefill):
    longest_wait = sum(size for size, _ in kinds)
    everyone = [Client(lambda size=size: size, rows) for size, rows in kinds]
    queue: list[Client] = []
    for number in range(3 * longest_wait):
        for client in everyone:
            if not client.num_left:
                client.num_left, client.since = client.next_step(), number
                queue.append(client)
        picture = [requests(each.num_left, rows=each.rows, running=each.running) for each in queue]
        chosen = plan(*picture, pages=1 << 20, tokens=tokens, prefill=prefill).chunks
        for index, num_tokens in chosen:
            queue[index].num_left -= num_tokens
            queue[index].running = True
        queue = [each for each in queue if each.num_left]
        assert all(number - each.since <= longest_wait for each in queue)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@given(costs=st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1, max_size=20))
def test_training_gets_its_share_of_the_time_in_which_both_have_requests(share, costs):
    inference = training = 0.0
    for of_inference, of_training in costs * 20:
        if is_training_due(inference_seconds=inference, training_seconds=training, share=share):
            training += of_training
        else:
            inference += of_inference
        assert training - share * (inference + training) <= 1 + 1e-9
        assert share * (inference + training) - training <= share + 1e-9


moments = st.lists(st.floats(-2, 2), max_size=8)


@given(moments, st.integers(1, 8), st.floats(1e-3, 2))
def test_no_step_waits_as_long_as_a_pass_takes(expected: list[float], num_ready: int, pass_seconds: float):
    wait = batching_delay(expected, num_ready=num_ready, now=0.0, pass_seconds=pass_seconds)
    assert 0 <= wait < pass_seconds
    assert wait == 0 or any(abs(moment) == wait for moment in expected) or wait == LATE_SECONDS


def test_a_pass_waits_for_steps_that_come_in_a_moment_and_for_no_others():
    assert batching_delay([], num_ready=1, now=5.0, pass_seconds=1.0) == 0
    assert batching_delay([5.1], num_ready=1, now=5.0, pass_seconds=1.0) == pytest.approx(0.1)
    assert batching_delay([5.1, 5.2, 7.0], num_ready=2, now=5.0, pass_seconds=1.0) == pytest.approx(0.2)
    assert batching_delay([5.9], num_ready=8, now=5.0, pass_seconds=1.0) == 0
    assert batching_delay([3.0], num_ready=1, now=5.0, pass_seconds=1.0) == 0
    assert batching_delay([4.8], num_ready=1, now=5.0, pass_seconds=1.0) == pytest.approx(0.2)
    assert batching_delay([5.0], num_ready=7, now=5.0, pass_seconds=1.0) == LATE_SECONDS


def test_a_session_is_expected_after_it_was_away_as_long_as_before_whatever_was_computed_meanwhile():
    rhythm = Rhythm().after_arrival(0.0, decodes=False).after_answer(5.0)
    assert rhythm.expected_at is None
    rhythm = rhythm.after_arrival(5.3, decodes=True)
    assert rhythm.expected_at is None
    assert rhythm.after_answer(9.0).expected_at == pytest.approx(9.3)


def test_a_step_that_comes_before_the_last_one_is_answered_tells_nothing():
    rhythm = Rhythm().after_answer(1.0).after_arrival(1.5, decodes=True).after_arrival(1.6, decodes=True)
    assert rhythm.after_answer(2.0).expected_at is None


def test_a_pass_of_prefills_alone_ends_before_the_next_step_is_expected():
    model = PassTimeModel.measured(decode_seconds=0.1, prefill_token_seconds=0.001)
    for next_in, num_tokens in ((None, 100), (10.0, 100), (0.15, 50), (0.11, MIN_PREFILL_TOKENS)):
        budget = prefill_budget(model, [beginner(500)], limits=Limits(), is_decoding=True, next_in=next_in)
        assert budget.num_tokens(num_rows=1, num_past=0) == num_tokens
    assert shortest_prefill_seconds(model, [beginner(500)]) == pytest.approx(0.116)
    assert shortest_prefill_seconds(model, [requests(1)]) == 0
    assert seconds_to_next([3.0, 1.5, 0.8], now=1.0) == pytest.approx(0.2)
    assert seconds_to_next([], now=1.0) is None
