"""How many tokens are guessed: what it is worth, what it costs, and that it never loses much, whatever the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.generation.drafting.drafter import Drafter, Made, Source
from shoal.client.generation.drafting.ngram_drafter import NgramDrafter
from shoal.client.generation.drafting.wishes import grant
from shoal.client.generation.speculating import NO_GUESSES, Guesses, Speculation
from shoal.policy.speculation.acceptance import Acceptance, expected_tokens
from shoal.policy.speculation.guess_count import (
    FIRST_LOSS,
    LOSS,
    Balance,
    Offer,
    best_offer,
    num_guesses,
    tokens_per_second,
)
from shoal.policy.speculation.rounds_ahead import tokens_ahead
from shoal.policy.speculation.step_times import StepTimes

NUM_WORDS = 2000
FAR = 0.3, 0.001
"""Seconds of a step of one token, and of each token more: servers far apart."""
NEAR = 0.04, 0.01
"""The same on one machine."""


def times(one: float, each: float) -> StepTimes:
    known = StepTimes()
    for index in range(60):
        known = known.after(1 + index % 9, one + each * (index % 9))
    return known


class OneAtATime:
    """A drafter that does not look further: each round is judged before the next one leaves."""

    def __init__(self, drafter: Drafter) -> None:
        self.append, self.source, self.guesses = drafter.append, drafter.source, drafter.guesses


class Trap:
    """Knows the text, and is always wrong behind its own guesses."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text, self._position = text, 0

    def append(self, tokens: Sequence[int]) -> None:
        self._position += len(tokens)

    def source(self) -> Source:
        return Source("trap", 0.95)

    def guesses(self, count: int) -> list[int]:
        return list(self._text[self._position : self._position + count])

    def further(self, assumed: Sequence[int], count: int) -> list[int]:
        return [-1] * count


def guessed(speculation: Speculation, *, most: int, clock: Callable[[], float] = lambda: 0.0) -> Guesses:
    if (wish := speculation.wish(most=most)) is None:
        return NO_GUESSES
    [made] = grant([wish], clock)
    assert isinstance(made, Made)
    return speculation.granted(wish, made)


def played(
    text: Sequence[int], drafter: Drafter, *, one: float, each: float, noise: float = 0.05, seed: int = 0
) -> float:
    """How many times as fast a text comes with guesses as without, if steps take these seconds, more or less.

    Half of a step's time is the way to the slowest stage, which computes one step after another.
    """
    chance = Random(seed)
    speculation = Speculation(drafter, clock=lambda: 0.0)
    seconds = before = free = 0.0
    position = 0
    sent: list[tuple[Guesses, float, bool]] = []  # guesses, when they are answered, and whether they were ahead
    while position < len(text):
        left = len(text) - position - 1
        plan = [guesses for guesses, *_ in sent] or [guessed(speculation, most=min(64, left)) if left else NO_GUESSES]
        while (room := left - sum(len(guesses.tokens) for guesses in plan)) > 0:
            further = speculation.further(plan, most=min(64, room))
            if not further.tokens:
                break
            plan.append(further)
        for guesses in plan[len(sent) :]:
            trip = one * (1 + noise * chance.gauss(0, 1))
            free = max(free, seconds + trip / 2) + each * len(guesses.tokens)
            sent.append((guesses, free + trip / 2, bool(sent)))
        guesses, answered_at, was_ahead = sent.pop(0)
        seconds = max(seconds, answered_at)
        tokens = [text[position]]
        for guess, token in zip(guesses.tokens, text[position + 1 :], strict=False):
            if guess != tokens[-1]:
                break
            tokens.append(token)
        if speculation.judged(guesses, tokens, ahead=[later for later, *_ in sent]):
            sent[0] = (sent[0][0].reached(), *sent[0][1:])
        else:
            sent.clear()
        speculation.timed(guesses, len(tokens), seconds - before, was_ahead=was_ahead)
        before, position = seconds, position + len(tokens)
    return one * len(text) / seconds


def words(count: int, seed: int) -> list[int]:
    chance = Random(seed)
    return [chance.randrange(NUM_WORDS) for _ in range(count)]


def changed(text: Sequence[int], every: int) -> list[int]:
    return [NUM_WORDS + index if index % every == every - 1 else token for index, token in enumerate(text)]


@pytest.mark.parametrize(("speed", "verbatim", "rewritten"), [(FAR, 20.0, 6.0), (NEAR, 3.0, 2.0)])
def test_a_text_that_is_repeated_or_rewritten_comes_faster(
    speed: tuple[float, float], verbatim: float, rewritten: float
):
    one, each = speed
    text = words(600, 1)
    assert played(text, NgramDrafter(text), one=one, each=each) > verbatim
    assert played(changed(text, 10), NgramDrafter(text), one=one, each=each) > rewritten


@pytest.mark.parametrize("speed", [FAR, NEAR])
@given(seed=st.integers(0, 2**16), num_words=st.sampled_from([2, 20, 200, NUM_WORDS]))
def test_a_text_of_chance_loses_next_to_nothing(speed: tuple[float, float], seed: int, num_words: int):
    chance = Random(seed)
    text = [chance.randrange(num_words) for _ in range(500)]
    one, each = speed
    assert played(text[100:], NgramDrafter(text[:100]), one=one, each=each, seed=seed) > 0.97


@pytest.mark.parametrize("speed", [FAR, NEAR])
def test_a_text_whose_guesses_are_all_wrong_loses_next_to_nothing(speed: tuple[float, float]):
    """Each triple of words stood before, and each time something else follows."""
    one, each = speed
    text = [token for index in range(150) for token in (1, 2, 3, 10 + index)]
    assert played(text[40:], NgramDrafter(text[:40]), one=one, each=each) > 0.97


@pytest.mark.parametrize(("speed", "gain"), [(FAR, 1.8), (NEAR, 1.1)])
def test_a_long_text_that_is_repeated_comes_faster_with_several_rounds_under_way(
    speed: tuple[float, float], gain: float
):
    one, each = speed
    text = words(1500, 1)
    alone = played(text, OneAtATime(NgramDrafter(text)), one=one, each=each)
    assert played(text, NgramDrafter(text), one=one, each=each) > gain * alone


@pytest.mark.parametrize("speed", [FAR, NEAR])
def test_rounds_ahead_that_are_always_wrong_lose_next_to_nothing(speed: tuple[float, float]):
    one, each = speed
    text = words(1500, 1)
    alone = played(text, OneAtATime(Trap(text)), one=one, each=each)
    assert played(text, Trap(text), one=one, each=each) > 0.97 * alone


@pytest.mark.parametrize("speed", [FAR, NEAR])
def test_where_copies_end_now_and_then_rounds_ahead_win_on_average(speed: tuple[float, float]):
    """How many guesses there are differs with them and without, so a single text may come a little later."""
    one, each = speed
    text, ratios = words(600, 1), []
    for every in range(3, 160, 4):
        copied = changed(text, every)
        alone = played(copied, OneAtATime(NgramDrafter(text)), one=one, each=each, noise=0.0)
        ratios.append(played(copied, NgramDrafter(text), one=one, each=each, noise=0.0) / alone)
    assert sum(ratios) / len(ratios) > 1.0


@given(
    rate=st.floats(0, 1),
    one=st.floats(1e-3, 10),
    each=st.floats(0, 1),
    num_assumed=st.integers(1, 200),
    most=st.integers(0, 64),
)
def test_a_round_ahead_pays_where_what_it_wins_on_average_is_more_than_it_costs(
    rate: float, one: float, each: float, num_assumed: int, most: int
):
    known, offer = StepTimes(weight=1.0, seconds=one), Offer(rate, each)
    count = tokens_ahead(known, offer, num_assumed=num_assumed, most=most)
    assert 0 <= count <= most
    speed = tokens_per_second(known, offer, num_guesses(known, offer, most=64))
    won = rate**num_assumed * (expected_tokens(rate, count) - 1) / speed
    assert count * (known.each + each) <= won * (1 + 1e-9)
    assert tokens_ahead(known, offer, num_assumed=num_assumed + 1, most=most) <= count
    assert tokens_ahead(known, offer, num_assumed=num_assumed, most=most, most_seconds=0.0) == 0


@given(rate=st.floats(0, 1), one=st.floats(1e-3, 10), each=st.floats(0, 1), most=st.integers(0, 64))
def test_the_number_of_guesses_is_the_best_of_those_that_are_compared(rate: float, one: float, each: float, most: int):
    known = StepTimes(weight=1.0, seconds=one)
    best = num_guesses(known, Offer(rate, each), most=most)
    assert 0 <= best <= most

    def speed(count: int) -> float:
        return expected_tokens(rate, count) / (known.of(1 + count) + count * each)

    assert all(speed(best) >= speed(count) for count in (0, 1, 2, 4, 8, 16, 32, 64, most) if count <= most)


def test_of_several_drafts_the_one_that_gives_most_tokens_a_second_guesses():
    likely, free = Offer(0.9, 0.02), Offer(0.6)
    index, count = best_offer(times(*FAR), [free, likely], most=64) or (None, 0)
    assert (index, count) == (1, num_guesses(times(*FAR), likely, most=64))
    assert best_offer(times(*NEAR), [free, likely], most=64) == (0, num_guesses(times(*NEAR), free, most=64))
    assert best_offer(times(*NEAR), [Offer(0.9, 0.1), Offer(0.05)], most=64) is None
    assert best_offer(times(*FAR), [], most=64) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=4), st.floats(1e-3, 10), st.integers(0, 64))
def test_no_draft_and_no_other_number_of_guesses_is_faster(found: list[tuple[float, float]], one: float, most: int):
    known, offers = StepTimes(weight=1.0, seconds=one), [Offer(*each) for each in found]
    chosen = best_offer(known, offers, most=most)
    speed = tokens_per_second(known, Offer(0.0), 0) if chosen is None else 0.0
    if chosen is not None:
        index, count = chosen
        speed = tokens_per_second(known, offers[index], count)
    for offer in offers:
        assert all(speed >= tokens_per_second(known, offer, count) for count in (0, 1, 4, 16, most) if count <= most)


def test_nothing_is_guessed_before_a_step_was_measured():
    assert num_guesses(StepTimes(), Offer(1.0), most=64) == 0


def test_far_away_more_is_guessed_than_near():
    assert num_guesses(times(*FAR), Offer(0.9), most=64) > num_guesses(times(*NEAR), Offer(0.9), most=64) > 0
    assert num_guesses(times(*NEAR), Offer(0.05), most=64) == 0


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=60), st.floats(0, 1))
def test_a_rate_is_a_probability_and_follows_what_was_seen(seen: list[tuple[int, int]], prior: float):
    acceptance = Acceptance(prior)
    for right, wrong in seen:
        acceptance = acceptance.after(num_right=right, num_guesses=right + wrong)
        assert 0 <= acceptance.rate <= 1
    always = never = Acceptance(prior)
    for _ in range(40):
        always, never = (
            always.after(num_right=4, num_guesses=4),
            never.after(num_right=0, num_guesses=4),
        )
    assert always.rate > 0.9
    assert never.rate < 0.1


def test_the_line_through_the_times_is_found_and_follows_a_change():
    known = times(0.2, 0.01)
    assert known.of(1) == pytest.approx(0.2, rel=0.05)
    assert known.of(33) == pytest.approx(0.2 + 32 * 0.01, rel=0.1)
    for index in range(150):
        known = known.after(1 + index % 9, 0.05 + 0.002 * (index % 9))
    assert known.of(1) == pytest.approx(0.05, rel=0.1)


class Scripted:
    """Always guesses the same token, in seconds that it says and the clock shows."""

    def __init__(self, name: str, token: int, seconds_each: float = 0.0) -> None:
        self.kind, self.token, self.num_asked, self.seconds = Source(name, 0.5, seconds_each), token, 0, 0.0

    def append(self, tokens: Sequence[int]) -> None:
        pass

    def source(self) -> Source:
        return self.kind

    def guesses(self, count: int) -> list[int]:
        self.num_asked += 1
        self.seconds += count * self.kind.seconds_each
        return [self.token] * count


def test_the_draft_that_turns_out_to_be_right_guesses_and_its_time_is_not_taken_for_that_of_a_step():
    wrong, right = Scripted("wrong", 1), Scripted("right", 2, seconds_each=0.01)
    speculation = Speculation(wrong, right)
    speculation.timed(NO_GUESSES, 1, FAR[0])
    seconds, num_tokens = 0.0, 0
    for _ in range(60):
        before = right.seconds
        guesses = guessed(speculation, most=64, clock=lambda: right.seconds)
        tokens = [2] * (1 + (len(guesses.tokens) if guesses.source is right.kind else 0))
        took = FAR[0] + FAR[1] * len(guesses.tokens) + right.seconds - before
        speculation.judged(guesses, tokens)
        speculation.timed(guesses, len(tokens), took)
        seconds, num_tokens = seconds + took, num_tokens + len(tokens)
    assert right.num_asked > 4 * wrong.num_asked > 0
    assert num_tokens / seconds > 5 / FAR[0]
    assert len(guesses.tokens) >= num_guesses(times(*FAR), Offer(0.97, right.kind.seconds_each), most=64)


def test_one_step_that_takes_long_hardly_counts():
    known = times(0.2, 0.01)
    assert known.after(1, 60.0).of(1) < 1.2 * known.of(1)


def test_guesses_cost_no_more_than_was_won_and_a_part_of_all_time():
    balance, lost = Balance(), 0.0
    for _ in range(500):
        most = balance.may_lose(1.0)
        count = num_guesses(times(1.0, 0.1), Offer(0.9), most=64, most_seconds=most)
        lost += 0.1 * count
        balance = balance.after(1 + 0.1 * count, plain_seconds=1.0)  # all of them were wrong
    assert 0 < lost < FIRST_LOSS + LOSS * balance.elapsed
    won = balance.after(1.0, plain_seconds=5.0)
    assert won.may_lose(1.0) > balance.may_lose(1.0) + 3


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 70))
def test_guesses_are_what_followed_before(tokens: list[int], count: int):
    drafter = NgramDrafter(tokens)
    guesses = drafter.guesses(count)
    if drafter.source() is None:
        assert guesses == []
        assert not tokens or tokens[-1] not in tokens[:-1]
        return
    assert len(guesses) == count
    text = tokens + guesses
    assert any(text[place : place + count] == guesses for place in range(len(tokens)))


def test_guessing_goes_on_behind_a_word_that_was_changed():
    text = words(40, 2)
    drafter = NgramDrafter(text)
    drafter.append([*text[:10], NUM_WORDS])
    assert drafter.guesses(20) == text[11:31]
    drafter.append([NUM_WORDS + 1])
    assert drafter.source() is None


def test_a_text_that_goes_round_is_guessed_beyond_its_end():
    drafter = NgramDrafter([7, 8, 9, 7, 8, 9])
    assert drafter.guesses(8) == [7, 8, 9, 7, 8, 9, 7, 8]
