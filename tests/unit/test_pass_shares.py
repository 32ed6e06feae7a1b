"""Who takes part in a pass, who owes time to others, and in which order those come that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.net.addressing.addresses import network_of
from shoal.policy.batching.compute_account import ComputeAccount, client_weights
from shoal.policy.batching.fair_queueing import MAX_PAYERS, QUANTUM_SECONDS, FairQueue
from shoal.policy.batching.pass_shares import (
    AGED_SECONDS,
    Debts,
    PassShares,
    Sharing,
    charges,
    pass_shares,
    payer_of,
    prompt_turns,
)
from shoal.policy.batching.pass_times import Cost, PassTimeModel
from shoal.policy.batching.preemption import Holder
from shoal.policy.batching.scheduling import RequestView

WEIGHTS, TOKEN = 0.05, 0.0015
MODEL = PassTimeModel(WEIGHTS, Cost(WEIGHTS), Cost(TOKEN), Cost(WEIGHTS, TOKEN))


def step(payer: str, num_tokens: int = 1, *, rows: int = 1, running: bool = True, at: float = 0.0) -> RequestView:
    holder = Holder(payer, 1, 0.0, 0.0, 0)
    return RequestView(rows, num_tokens, running, lambda _: 0, arrived_at=at, session=holder)


def seconds(requests: Sequence[RequestView], shares: PassShares) -> float:
    taken = [each for index, each in enumerate(requests) if index not in shares.left_out]
    return WEIGHTS + sum(MODEL.added_by(each.work(each.num_tokens)) for each in taken)


payers = st.sampled_from("abcd")
decoding = st.builds(step, payers, st.integers(1, 8), rows=st.integers(1, 64))


@given(st.lists(decoding, min_size=1, max_size=40))
def test_a_pass_gives_each_payer_its_share_unless_one_step_alone_takes_longer(requests: list[RequestView]):
    shares = pass_shares(requests, Sharing(MODEL))
    taken = [each for index, each in enumerate(requests) if index not in shares.left_out]
    loads: dict[str, list[float]] = {}
    for each in taken:
        loads.setdefault(payer_of(each), []).append(MODEL.added_by(each.work(each.num_tokens)))
    assert taken
    if len({payer_of(each) for each in requests}) == 1:
        assert not shares.left_out
        return
    longest = max(
        (its[0] for its in loads.values() if len(its) == 1), default=0.0
    )  # it may be the one that is too long
    least = min(sum(its) for its in loads.values())
    allowed = shares.total_weight * (WEIGHTS + least)
    assert seconds(requests, shares) - longest <= allowed * (1 + 1e-6)


@given(st.lists(decoding, min_size=1, max_size=40), payers)
def test_who_asks_for_one_step_of_one_token_is_in_every_pass(requests: list[RequestView], payer: str):
    requests = [each for each in requests if payer_of(each) != payer]
    assert len(requests) not in pass_shares([*requests, step(payer)], Sharing(MODEL)).left_out


@given(st.integers(1, 40), st.integers(1, 12))
def test_payers_with_as_much_work_are_not_limited(num_payers: int, num_steps: int):
    requests = [step(str(payer)) for payer in range(num_payers) for _ in range(num_steps)]
    assert not pass_shares(requests, Sharing(MODEL)).left_out


def test_one_step_beside_sixty_keeps_half_of_its_speed_and_the_oldest_of_the_sixty_go_first():
    requests = [step("a"), *(step("b") for _ in range(60))]
    shares = pass_shares(requests, Sharing(MODEL))
    assert seconds(requests, shares) == pytest.approx(2 * (WEIGHTS + TOKEN), abs=TOKEN)
    assert shares.left_out == frozenset(range(61 - len(shares.left_out), 61))


def test_who_is_away_for_a_moment_limits_a_pass_as_if_it_were_here():
    requests = [step("b") for _ in range(60)]
    assert not pass_shares(requests, Sharing(MODEL)).left_out
    shares = pass_shares(requests, Sharing(MODEL, away=frozenset("a")))
    assert seconds(requests, shares) <= 2 * (WEIGHTS + TOKEN) * (1 + 1e-6)


def test_a_step_that_cannot_be_cut_is_computed_and_its_payer_then_waits_as_long_as_it_took_too_long():
    requests = [step("a"), step("b", rows=1024)]
    shares = pass_shares(requests, Sharing(MODEL))
    assert not shares.left_out
    took = seconds(requests, shares)
    parts = [(payer_of(each), each.work(1)) for each in requests]
    owed = shares.excess(charges(parts, MODEL, took), took)
    assert owed == {"b": pytest.approx(took - shares.seconds)}
    debts = Debts().after(took, present="ab", took_part="ab", excess=owed)
    waited = 0.0
    while 1 in pass_shares(requests, Sharing(MODEL, debts=debts)).left_out:
        debts = debts.after(WEIGHTS + TOKEN, present="ab", took_part="a")
        waited += WEIGHTS + TOKEN
    assert waited == pytest.approx(took - shares.seconds, abs=2 * WEIGHTS)


def test_who_owes_time_uses_what_others_leave_and_does_not_delay_them():
    debts = Debts({"b": 10.0})
    requests = [step("b"), step("b", rows=1024)]
    away = Sharing(MODEL, away=frozenset("a"), next_in=0.1, debts=debts)
    assert pass_shares(requests, away).left_out == {1}
    assert pass_shares(requests, Sharing(MODEL, away=frozenset("a"), next_in=0.01, debts=debts)).left_out == {0, 1}
    assert not pass_shares(requests, Sharing(MODEL, debts=debts)).left_out


def test_debts_that_all_have_cancel_out_and_who_is_alone_owes_nothing():
    debts = Debts({"a": 1.0, "b": 3.0})
    assert debts.after(0.0, present="ab").seconds == {"b": 2.0}
    assert debts.after(0.0, present="b").seconds == {}


work = st.lists(st.tuples(payers, st.floats(0.01, 2.0)), min_size=1, max_size=200)


@given(st.lists(st.floats(0.01, 2.0), min_size=50, max_size=300))
def test_payers_that_always_want_more_have_as_much_within_a_quantum_and_a_piece(pieces: list[float]):
    queue, had = FairQueue(), dict.fromkeys("abc", 0.0)
    for piece in pieces:
        payer = min("abc", key=lambda each: queue.turn_of(each, "abc"))
        had[payer] += piece
        queue = queue.charged({payer: piece}, waiting="abc")
    assert max(had.values()) - min(had.values()) <= QUANTUM_SECONDS + max(pieces) + 1e-6


@given(work)
def test_who_was_idle_begins_with_those_that_have_used_least_and_gains_nothing(done: list[tuple[str, float]]):
    queue = FairQueue()
    for payer, its in done:
        queue = queue.charged({payer: its}, waiting="abcd")
    assert queue.of("new") == min(queue.of(each) for each in "abcd")
    assert queue.charged({}, waiting=()).used == {}


def test_many_payers_are_forgotten():
    queue = FairQueue({str(each): 1.0 + each for each in range(MAX_PAYERS)})
    assert len(queue.charged({"new": 1e6}, waiting=["other"]).used) == MAX_PAYERS


def test_a_short_prompt_comes_before_sixty_long_ones_but_not_for_ever():
    requests = [*(step("b", 2000, running=False) for _ in range(60)), step("a", 20, running=False, at=1.0)]
    turns = prompt_turns(requests, Sharing(MODEL), now=2.0)
    assert turns["a"] < turns["b"]
    assert turns["a"] >= prompt_turns(requests, Sharing(MODEL), now=AGED_SECONDS + 1)["b"]
    served = Sharing(MODEL, prompted_at={"b": AGED_SECONDS})
    assert turns["a"] < prompt_turns(requests, served, now=AGED_SECONDS + 1)["b"]
    assert prompt_turns(requests[:60], Sharing(MODEL), now=0.0) == {}


def test_whose_prompts_were_computed_longer_come_later_but_not_if_nothing_else_can_be_computed():
    used = FairQueue({"b": 3 * QUANTUM_SECONDS})
    requests = [step("b", 500), step("a", 500)]
    assert pass_shares(requests, Sharing(MODEL, used=used)).later == {0}
    assert pass_shares(requests[:1], Sharing(MODEL, used=used)).later == frozenset()


def test_the_steps_of_a_payer_count_together_as_those_of_the_payer_with_the_fewest():
    num_ready, weights = client_weights(["a", *"bbbb"], ["b"] * 56)
    assert num_ready == pytest.approx(1 + 4 / 60)
    assert sum(weights) == pytest.approx(56 / 60)
    assert client_weights("aab", "b") == (3, [1])


def test_the_pieces_that_delayed_others_are_owed_to_them():
    account = ComputeAccount().after_piece("b", 2.0, delayed_others=True, present=frozenset("a"), queued={"b"}, now=0.0)
    assert account.debts.of("b") == 2.0
    assert account.piece_seconds == {"b": 2.0}
    assert account.after_waiting(1.5, present=frozenset("ab")).debts.of("b") == 0.5


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("/ip4/8.8.4.200/tcp/5/p2p/x", "8.8.4.0/24"),
        ("/ip4/192.168.1.7/tcp/5", "192.168.1.7"),
        ("/ip6/2a00:1450:4001:831::200e/tcp/5", "2a00:1450:4001:831::/64"),
        ("/ip4/8.8.4.4/tcp/5/p2p/relay/p2p-circuit/p2p/x", "the relays in 8.8.4.0/24"),
    ],
)
def test_a_payer_is_what_one_customer_has_of_a_network(address: str, network: str):
    assert network_of(address) == network


weights = st.dictionaries(payers, st.floats(1.0, 4.0))


@given(st.lists(decoding, min_size=1, max_size=40), st.sets(payers))
def test_weights_of_one_change_nothing(requests: list[RequestView], away: set[str]):
    plain = Sharing(MODEL, away=frozenset(away), prompted_at={"a": 1.0})
    weighed = replace(plain, weights=dict.fromkeys("abcd", 1.0))
    assert replace(pass_shares(requests, weighed), weights={}) == pass_shares(requests, plain)


@given(st.lists(decoding, min_size=1, max_size=40), weights)
def test_a_pass_gives_each_payer_the_share_that_its_weight_says(
    requests: list[RequestView], weighing: dict[str, float]
):
    sharing = Sharing(MODEL, weights=weighing)
    shares = pass_shares(requests, sharing)
    loads: dict[str, list[float]] = {}
    for index, each in enumerate(requests):
        if index not in shares.left_out:
            loads.setdefault(payer_of(each), []).append(MODEL.added_by(each.work(each.num_tokens)))
    assert loads
    present = {payer_of(each) for each in requests}
    if len(present) == 1:
        return
    longest = max((its[0] for its in loads.values() if len(its) == 1), default=0.0)
    total = sum(sharing.weight(payer) for payer in present)
    allowed = min(total * (WEIGHTS + sum(its)) / sharing.weight(payer) for payer, its in loads.items())
    assert seconds(requests, shares) - longest <= allowed * (1 + 1e-6)


def test_a_step_of_a_weight_of_four_keeps_four_fifths_of_its_speed_beside_sixty_and_these_the_rest():
    requests = [step("giver"), *(step("taker") for _ in range(60))]
    shares = pass_shares(requests, Sharing(MODEL, weights={"giver": 4.0}))
    assert seconds(requests, shares) <= (WEIGHTS + TOKEN) * 5 / 4 * (1 + 1e-6)
    assert 0 not in shares.left_out
    assert 0 < len(shares.left_out) < 60


def test_one_step_beside_many_of_a_payer_with_a_weight_is_in_every_pass():
    requests = [*(step("giver") for _ in range(60)), step("taker")]
    shares = pass_shares(requests, Sharing(MODEL, weights={"giver": 4.0}))
    assert not shares.left_out


def test_of_prompts_that_are_equal_in_all_else_that_of_the_larger_weight_comes_first():
    requests = [step("taker", 64, running=False), step("giver", 64, running=False, at=1.0)]
    turns = prompt_turns(requests, Sharing(MODEL, weights={"giver": 2.0}), now=2.0)
    assert turns["giver"] < turns["taker"]
    used = FairQueue({"giver": QUANTUM_SECONDS})
    turns = prompt_turns(requests, Sharing(MODEL, weights={"giver": 2.0}, used=used), now=2.0)
    assert turns["giver"] > turns["taker"]  # no weight keeps the other one from its share


def test_what_a_pass_took_too_long_is_owed_beyond_the_share_of_a_weight():
    shares = PassShares(seconds=1.0, total_weight=5.0, weights={"giver": 4.0})
    assert shares.excess({"giver": 0.75, "taker": 0.75}, 1.5) == {"taker": pytest.approx(0.5)}


def test_the_weights_of_an_account_are_those_of_the_payers_that_are_there():
    account = ComputeAccount().weighing({"giver": 4.0, "taker": 1.0, "gone": 2.0}.__getitem__, {"giver", "taker"})
    assert account.weights == {"giver": 4.0}
    assert account.weighing(lambda payer: 1.0, {"giver"}).weights == {}
    after = account.after_piece("giver", 2.0, delayed_others=False, present=(), queued={"taker"}, now=0.0)
    assert after.used.of("giver") == 0.5


def test_a_pass_is_charged_to_a_payer_by_its_weight():
    account = ComputeAccount().weighing(lambda payer: 4.0, {"giver"})
    parts = [("giver", step("giver", 64, running=False).work(64))]
    after = account.after_pass(
        parts,
        2.0,
        shares=PassShares(),
        pass_time=MODEL,
        present={"giver", "taker"},
        queued={"giver", "taker"},
        now=1.0,
        recently=1.0,
    )
    assert after.used.of("giver") == 0.5
