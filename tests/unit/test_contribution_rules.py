"""What contribution earns, whatever is signed: the rules, without a network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.batching.fair_queueing import FairQueue
from shoal.policy.contribution.credit import NUM_PERIODS, PASSED_ON, PERIOD_SECONDS, counts, credits_of, period_of
from shoal.policy.contribution.priority import MAX_WEIGHT, charged, weight_of

HONEST = ["alice", "bob", "carol"]
SYBILS = ["s0", "s1", "s2", "s3"]
work = st.integers(0, 10**9).map(float)  # as it is signed
gifts = st.dictionaries(st.sampled_from(HONEST), work)
honest_claims = st.dictionaries(st.tuples(st.sampled_from(HONEST), st.sampled_from([*HONEST, "s0"])), work)
own_claims = st.dictionaries(st.tuples(st.sampled_from(SYBILS), st.sampled_from([*SYBILS, *HONEST])), work)


def total(credits: dict[str, float], peers: list[str]) -> float:
    return sum(credits.get(peer, 0.0) for peer in peers)


@given(gifts, st.dictionaries(st.sampled_from(SYBILS), work), honest_claims, own_claims)
def test_no_credit_comes_from_nothing(gave, sybils_gave, claims, own):
    found = credits_of(gave | sybils_gave, claims | own)
    received = sum((gave | sybils_gave).values())
    assert all(credit >= 0 for credit in found.values())
    assert sum(found.values()) == pytest.approx(received)


@given(gifts, honest_claims, own_claims)
def test_a_ring_that_has_served_no_contact_earns_nothing_whatever_it_signs(gave, claims, own):
    claims = {pair: each for pair, each in claims.items() if pair[1] not in SYBILS}
    assert total(credits_of(gave, claims | own), SYBILS) == 0
    assert credits_of(gave, claims | own) == credits_of(gave, claims)


@given(
    gifts,
    work,
    honest_claims,
    own_claims,
    st.lists(st.floats(0, 1), min_size=len(SYBILS), max_size=len(SYBILS)).filter(sum),
)
def test_an_identity_that_is_split_into_many_earns_no_more_than_it_gave_and_contacts_acknowledge(
    gave, its, claims, own, parts
):
    """Whatever the parts sign: at most what one identity has of which no other claims a part."""
    whole = credits_of(gave | {"s0": its}, claims).get("s0", 0.0)
    split = {name: its * part / sum(parts) for name, part in zip(SYBILS, parts, strict=True)}
    acknowledged = {pair: each for pair, each in claims.items() if pair[1] == "s0"}
    shared = {
        (contact, name): each * part / sum(parts)
        for (contact, _), each in acknowledged.items()
        for name, part in zip(SYBILS, parts, strict=True)
    }
    others = {pair: each for pair, each in claims.items() if pair not in acknowledged}
    found = total(credits_of(gave | split, others | shared | own), SYBILS)
    assert found <= whole + 1e-6 * max(1.0, whole)


@given(gifts, honest_claims)
def test_half_of_what_a_contact_gave_stays_its_own_and_claims_through_it_share_the_rest(gave, claims):
    found = credits_of(gave, {pair: each for pair, each in claims.items() if pair[0] == "alice" != pair[1]})
    through = sum(found.values()) - found.get("alice", 0.0) - sum(gave.values()) + gave.get("alice", 0.0)
    assert found.get("alice", 0.0) >= (1 - PASSED_ON) * gave.get("alice", 0.0) * (1 - 1e-9)
    assert through <= PASSED_ON * gave.get("alice", 0.0) + 1e-6 * max(1.0, sum(gave.values()))


def test_work_for_a_contact_counts_as_far_as_the_contact_gave_something():
    assert credits_of({"x": 100.0}, {("x", "s"): 30.0}) == {"x": 70.0, "s": 30.0}
    assert credits_of({"x": 100.0}, {("x", "s"): 30.0, ("x", "t"): 1e6})["s"] < 0.01
    assert credits_of({"x": 100.0}, {("x", "s"): 500.0}) == {"x": 50.0, "s": 50.0}
    assert credits_of({}, {("x", "s"): 500.0}) == {}


@given(work.filter(bool), work)
def test_weights_are_between_one_and_the_most_and_fall_with_use(credit: float, consumed: float):
    assert 1.0 <= weight_of(credit, consumed) <= MAX_WEIGHT
    assert weight_of(credit, consumed + 1e9) <= weight_of(credit, consumed)
    assert weight_of(0.0, consumed) == 1.0
    assert weight_of(credit, 0.0) == MAX_WEIGHT


@given(st.dictionaries(st.sampled_from(SYBILS), st.floats(1e-3, 1e9), min_size=2), st.floats(1, 1e9), st.data())
def test_it_is_no_use_to_leave_out_an_account_that_has_consumed_much(credits, used, data):
    consumed = charged(credits, used)
    assert sum(consumed.values()) == pytest.approx(used)
    some = data.draw(st.lists(st.sampled_from(sorted(credits)), min_size=1, unique=True))
    part = weight_of(sum(credits[each] for each in some), sum(consumed[each] for each in some))
    assert part == pytest.approx(weight_of(sum(credits.values()), used))


@pytest.mark.parametrize(("weight", "times"), [(1.0, 1.0), (2.5, 2.5), (4.0, 4.0)])
def test_a_payer_of_a_weight_gets_as_many_times_the_time_of_one_without(weight: float, times: float):
    queue, had = FairQueue(), {"taker": 0.0, "giver": 0.0}
    for _ in range(3000):
        payer = min(had, key=lambda each: (queue.turn_of(each, had), had[each]))
        had[payer] += 0.1
        queue = queue.charged({payer: 0.1}, waiting=had, weights={"giver": weight})
    assert had["giver"] / had["taker"] == pytest.approx(times, rel=0.05)


def test_weeks_count_for_a_month():
    assert period_of(5 * PERIOD_SECONDS + 1) == 5
    assert [period for period in range(10) if counts(period, now=7)] == [4, 5, 6, 7]
    assert NUM_PERIODS == 4
