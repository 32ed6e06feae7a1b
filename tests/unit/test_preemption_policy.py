"""Which session is preempted: no session keeps pages idly, and all sessions that work come to an end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.policy.batching.pass_times import Cost, PrefillBudget
from shoal.policy.batching.preemption import (
    IDLE_SECONDS,
    IMBALANCE,
    PATIENCE_SECONDS,
    TURN_SECONDS,
    Holder,
    preempted_for_new,
    preempted_for_running,
    preempted_while_nobody_runs,
)
from shoal.policy.batching.scheduling import RequestView, schedule

NOW = 1000.0


def holder(peer: str, num_pages: int, *, unused: float = 0.0, old: float = 500.0, opened: int = 0, at_work=False):
    return Holder(peer, num_pages, NOW - unused, NOW - old, opened, at_work)


holders = st.builds(
    holder,
    st.sampled_from("abcd"),
    st.integers(1, 50),
    unused=st.floats(0, 100),
    old=st.floats(0, 100),
    opened=st.integers(0, 100),
    at_work=st.booleans(),
)


def held(some: list[Holder]) -> Counter[str]:
    total = Counter[str]()
    for each in some:
        total[each.peer] += each.num_pages
    return total


@given(st.lists(holders, min_size=1, max_size=12))
def test_what_is_idle_is_preempted_first_and_then_the_largest_holder(some):
    chosen = some[preempted_for_running(some, now=NOW)]
    idle = [each for each in some if each.is_idle(NOW)]
    assert chosen in idle or not idle
    assert all(held(some)[chosen.peer] >= held(some)[each.peer] for each in idle or some)
    mine = [each for each in idle or some if each.peer == chosen.peer]
    assert all(chosen.at_work <= each.at_work for each in mine)
    assert all(chosen.used_at <= each.used_at for each in mine if each.at_work == chosen.at_work)


def test_sessions_that_are_opened_early_and_grow_by_a_token_do_not_outlast_one_that_works():
    many = [holder("greedy", 16, unused=1.0, opened=number) for number in range(20)]
    late = holder("honest", 30, opened=99, at_work=True)
    assert preempted_for_running([*many, late], now=NOW) < 20
    spread = [holder(f"identity {number}", 16, unused=31.0, opened=number) for number in range(20)]
    assert preempted_for_running([*spread, late], now=NOW) < 20


@given(st.lists(holders, max_size=12), st.sampled_from("abcd"), st.integers(1, 30), st.floats(0, 5))
def test_a_new_session_takes_idle_pages_or_those_of_a_peer_that_has_many_times_as_many(some, peer, num, waited):
    found = preempted_for_new(some, peer=peer, num_pages=num, num_missing=num, waited=waited, now=NOW)
    if found is None:
        return
    chosen = some[found]
    if not chosen.is_idle(NOW) or sum(each.num_pages for each in some if each.is_idle(NOW)) < num:
        assert waited >= PATIENCE_SECONDS
        assert held(some)[chosen.peer] > IMBALANCE * (held(some)[peer] + num)
        assert NOW - chosen.began_at >= TURN_SECONDS


def test_idle_sessions_are_not_preempted_in_vain():
    idle = holder("a", 3, unused=IDLE_SECONDS)
    assert preempted_for_new([idle], peer="b", num_pages=3, num_missing=3, waited=0, now=NOW) == 0
    assert preempted_for_new([idle], peer="b", num_pages=3, num_missing=0, waited=9, now=NOW) is None
    assert preempted_for_new([idle], peer="b", num_pages=9, num_missing=9, waited=9, now=NOW) is None
    resting = holder("a", 3, unused=IDLE_SECONDS - 1)
    assert preempted_for_new([resting], peer="b", num_pages=3, num_missing=3, waited=9, now=NOW) is None


@pytest.mark.parametrize("peer", ["greedy", "other"])
def test_a_session_that_has_just_begun_and_a_peer_that_holds_little_more_keep_their_pages(peer: str):
    new, old = holder("greedy", 60, old=TURN_SECONDS - 1), holder("greedy", 40, at_work=True)
    found = preempted_for_new([new, old], peer=peer, num_pages=20, num_missing=20, waited=2.0, now=NOW)
    assert found == (1 if peer == "other" else None)
    assert preempted_for_new([new, old], peer=peer, num_pages=60, num_missing=60, waited=2.0, now=NOW) is None


def test_sessions_that_wait_for_others_do_not_keep_the_first_one_out_for_ever():
    waits = [replace(holder(peer, 4, opened=number, at_work=True), running=False) for number, peer in enumerate("abb")]

    def found(some: list[Holder], *, num_missing: int = 9, waited: float = PATIENCE_SECONDS) -> int | None:
        return preempted_while_nobody_runs(some, num_missing=num_missing, waited=waited, now=NOW)

    assert found(waits) == 2
    assert found(waits, waited=PATIENCE_SECONDS / 2) is None
    assert found(waits, num_missing=13) is None
    assert found([*waits, holder("c", 9, opened=3)]) is None
    assert found([*waits, holder("c", 9, opened=3, unused=IDLE_SECONDS)]) == 3


@dataclass
class Client:
    """Decodes some tokens; the answers that it has stay, also when it loses its pages."""

    peer: str
    prompt: int
    target: int
    answered: int = 0
    cached: int = 0
    pages: int = 0
    used_at: float = 0.0
    began_at: float = 0.0

    @property
    def lacks(self) -> int:
        """The tokens of its step: all that the server has not, and at least one more than was answered."""
        return max(self.answered + 1, self.prompt) - self.cached

    def needs(self, num_tokens: int) -> int:
        return -(-(self.cached + num_tokens) // 16) - self.pages


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100), st.integers(1, 60)), min_size=1, max_size=6),
    st.integers(0, 6),
    st.sampled_from([1e-3, 1.0, 20.0]),
)
@example([("a", 51, 55), ("a", 23, 6), ("a", 6, 11), ("b", 1, 1), ("b", 1, 1)], 0, 20.0)
@settings(deadline=None)
def test_sessions_with_room_for_one_only_all_come_to_an_end(each, spare, pass_seconds):
    clients = [Client(peer, prompt, prompt + more) for peer, prompt, more in each]
    num_pages = max(-(-client.target // 16) for client in clients) + spare
    now, passes, queue = 0.0, 0, list(clients)
    while working := [client for client in queue if client.answered < client.target]:
        passes += 1
        assert passes < 20_000, "it never ends"
        now += pass_seconds
        for client in clients:
            if client not in working:
                client.pages = client.cached = 0
        _pass(working, clients, queue, num_pages, now)


def _in_order(working: list[Client], clients: list[Client]) -> list[Client]:
    """As the server orders steps: those that have not begun come after those of peers that hold fewer pages."""
    held = Counter[str]()
    for client in clients:
        held[client.peer] += client.pages
    return sorted(working, key=lambda client: 0 if client.pages else held[client.peer])


def _pass(working: list[Client], clients: list[Client], queue: list[Client], num_pages: int, now: float) -> None:
    while True:
        working = _in_order(working, clients)
        waiting = [RequestView(1, client.lacks, client.pages > 0, client.needs) for client in working]
        free = num_pages - sum(client.pages for client in clients)
        plan = schedule(waiting, num_free_pages=free, max_num_batched_tokens=64, prefill=PrefillBudget(32.0, Cost(1.0)))
        holding = [client for client in working if client.pages]
        view = [
            Holder(client.peer, client.pages, client.used_at, client.began_at, clients.index(client), at_work=True)
            for client in holding
        ]
        index: int | None = None
        if plan.short_of_pages:
            index = preempted_for_running(view, now=now)
        elif plan.kept_out is not None:
            out, missing = plan.kept_out
            need = waiting[out].num_pages(working[out].lacks)
            index = preempted_for_new(
                view, peer=working[out].peer, num_pages=need, num_missing=missing, waited=9.0, now=now
            )
        if index is None:
            break
        preempted = holding[index]
        preempted.pages = preempted.cached = 0
        for line in (queue, working):  # its client opens another session, and comes after those that wait
            line.remove(preempted)
            line.append(preempted)
    for index, num_tokens in plan.chunks:
        client = working[index]
        if not client.pages:
            client.began_at = now
        client.pages += client.needs(num_tokens)
        client.cached, client.used_at = client.cached + num_tokens, now
        client.answered = max(client.answered, client.cached if client.cached >= client.prompt else 0)


def test_the_sessions_of_a_peer_with_a_weight_give_way_later():
    holders = [replace(holder("giver", 30, opened=0), weight=4.0), holder("taker", 10, opened=1)]
    assert holders[preempted_for_running(holders, now=NOW)].peer == "taker"
    unweighted = [replace(each, weight=1.0) for each in holders]
    assert unweighted[preempted_for_running(unweighted, now=NOW)].peer == "giver"


def test_a_new_session_of_a_peer_with_a_weight_counts_as_smaller():
    holders = [holder("taker", 30, opened=0, old=100.0)]
    new = {"peer": "giver", "num_pages": 20, "num_missing": 10, "waited": 5.0, "now": NOW}
    assert preempted_for_new(holders, **new) is None
    assert preempted_for_new(holders, **new, weight=4.0) == 0
