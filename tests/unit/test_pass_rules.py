"""Rules choose a pass, or a session that gives up its pages, and say so in time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cli.options import Scheduling
from shoal.errors import UserError
from shoal.policy.batching.fair_queueing import QUANTUM_SECONDS, FairQueue
from shoal.policy.batching.pass_rules import (
    DEFAULT_RULE,
    LARGE_SHARE,
    MAX_PLACES,
    PLACE_SECONDS,
    ROOM_TO_GROW,
    RULES,
    EngineView,
    PassRule,
    Places,
    fair,
    first_come,
    last_come,
    rule_of,
)
from shoal.policy.batching.pass_shares import Sharing
from shoal.policy.batching.pass_times import Cost, PassTimeModel, PrefillBudget
from shoal.policy.batching.preemption import IDLE_SECONDS, Holder
from shoal.policy.batching.scheduling import RequestView

PAGE = 16
NOW = 1000.0
MODEL = PassTimeModel.measured(decode_seconds=1e-3, prefill_token_seconds=1e-4)


def session(opened: int, num_pages: int, *, peer: str | None = None, since: float = 0.0, **changes) -> Holder:
    running = changes.pop("running", num_pages > 0)
    changes = {"used_at": NOW, "began_at": NOW, "at_work": True, **changes}
    return Holder(peer or f"peer {opened}", num_pages, opened=opened, since=since, running=running, **changes)


def step(of: Holder, num_tokens: int = 1, *, room: int = 0, arrived_at: float = NOW) -> RequestView:
    """A step of a session whose pages have room for `room` more tokens."""
    return RequestView(
        1, num_tokens, of.running, lambda tokens: max(0, -(-(tokens - room) // PAGE)), arrived_at=arrived_at, session=of
    )


def view(steps: list[RequestView], *idle: Holder, free: int = 100, pages: int = 100, prefill: int = 64) -> EngineView:
    sessions = [each.session for each in steps if each.session is not None and each.session.num_pages]
    return EngineView(
        steps,
        [*sessions, *idle],
        num_pages=pages,
        num_free_pages=free,
        max_num_batched_tokens=1024,
        prefill=PrefillBudget(float(prefill), Cost(1.0)),
        now=NOW,
    )


@st.composite
def views(draw: st.DrawFn) -> EngineView:
    steps: list[RequestView] = []
    idle: list[Holder] = []
    for opened in range(draw(st.integers(1, 10))):
        num_pages = draw(st.integers(0, 10))
        one = session(
            opened,
            num_pages,
            peer=draw(st.sampled_from("abc")),
            since=draw(st.floats(0, NOW)),
            used_at=draw(st.floats(NOW - 60, NOW)),
            began_at=draw(st.floats(NOW - 60, NOW)),
        )
        if num_pages and draw(st.booleans()):
            idle.append(Holder(one.peer, num_pages, one.used_at, one.began_at, opened, since=one.since))
        else:
            arrived_at = draw(st.floats(NOW - 20, NOW))
            steps.append(step(one, draw(st.integers(1, 100)), room=draw(st.integers(0, 15)), arrived_at=arrived_at))
    held = sum(each.session.num_pages for each in steps if each.session) + sum(each.num_pages for each in idle)
    free = draw(st.integers(0, 40))
    return view(steps, *idle, free=free, pages=held + free, prefill=draw(st.integers(1, 64)))


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
@given(some=views())
def test_a_rule_computes_what_there_are_pages_for_or_names_a_session_that_gives_way(rule: PassRule, some: EngineView):
    choice = rule(some)
    if choice.preempted is not None:
        assert choice.chunks == ()
        assert choice.preempted in range(len(some.holders))
        return
    assert len({index for index, _ in choice.chunks}) == len(choice.chunks)
    assert all(1 <= num_tokens <= some.requests[index].num_tokens for index, num_tokens in choice.chunks)
    assert sum(some.requests[index].num_pages(tokens) for index, tokens in choice.chunks) <= some.num_free_pages
    if any(request.running for request in some.requests):
        assert choice.chunks


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
@given(some=views())
def test_a_rule_that_is_asked_again_until_nobody_gives_way_comes_to_an_end(rule: PassRule, some: EngineView):
    for _ in range(len(some.holders) + 1):
        choice = rule(some)
        if choice.preempted is None:
            return
        gone = some.holders[choice.preempted]
        requests = [each for each in some.requests if each.session is None or each.session.opened != gone.opened]
        holders = [each for each in some.holders if each is not gone]
        some = view(
            requests, *(each for each in holders if not each.at_work), free=some.num_free_pages + gone.num_pages
        )
    raise AssertionError("a rule takes pages from sessions that have none")


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_decoding_comes_before_prompts(rule: PassRule):
    waits, decodes = step(session(0, 0), 50), step(session(1, 3))
    assert rule(view([waits, decodes])).chunks == ((1, 1), (0, 50))


def test_first_come_begins_sessions_in_the_order_in_which_their_clients_came():
    late, early = step(session(0, 0, since=NOW - 1), 40), step(session(1, 0, since=NOW - 9), 40)
    assert first_come(view([late, early], prefill=64)).chunks == ((1, 40), (0, 24))
    assert fair(view([late, early], prefill=64)).chunks == ((0, 40), (1, 24))


def test_first_come_leaves_room_for_running_sessions_to_grow():
    running = [step(session(number, 5), room=8) for number in range(3)]
    new = step(session(9, 0), 2 * PAGE)
    room = 2 + 3 * ROOM_TO_GROW
    assert 3 in dict(first_come(view([*running, new], free=room)).chunks)
    assert 3 not in dict(first_come(view([*running, new], free=room - 1)).chunks)
    assert first_come(view([new], free=2)).chunks == ((0, 32),)


@given(st.lists(st.builds(session, st.integers(0, 99), st.integers(1, 9), since=st.floats(0, NOW)), min_size=1))
def test_the_session_that_gives_way_to_first_come_is_the_one_whose_client_came_last(some: list[Holder]):
    chosen = some[last_come(some, num_pages=1000, now=NOW)]
    assert all(chosen.since >= each.since for each in some)


def test_an_idle_session_and_a_peer_that_holds_much_give_way_before_the_last_that_came():
    old, last = session(0, 5, since=1.0), session(1, 5, since=9.0)
    idle = session(2, 1, since=0.0, at_work=False, used_at=NOW - IDLE_SECONDS)
    assert last_come([old, last, idle], num_pages=100, now=NOW) == 2
    large = [session(number, 15, peer="greedy", since=number / 10) for number in (2, 3)]
    assert last_come([old, last, *large], num_pages=round(30 / LARGE_SHARE) - 1, now=NOW) == 3
    assert last_come([old, last, *large], num_pages=round(30 / LARGE_SHARE), now=NOW) == 1


def test_first_come_takes_no_pages_of_a_working_session_for_a_new_one():
    old = session(0, 80, since=0.0, began_at=0.0)
    new = step(session(1, 0, since=NOW - 15), 10 * PAGE, arrived_at=NOW - 15)
    crowd = view([step(old), new], free=5)
    assert fair(crowd).preempted == 0
    assert first_come(crowd).chunks == ((0, 1),)


def test_operators_can_choose_every_rule_by_name_and_no_other():
    assert list(Scheduling) == list(RULES)
    assert rule_of(DEFAULT_RULE) is fair
    with pytest.raises(UserError, match="no scheduling 'fairest'") as error:
        rule_of("fairest")
    assert error.value.hint == ", ".join(RULES)


def test_a_client_that_was_told_to_come_back_has_its_place_for_a_while_and_once():
    places = Places().told_to_come_back("a", since=10.0, now=30.0)
    assert places.of("a", 32.0) == 10.0
    assert places.of("b", 32.0) == 32.0
    assert places.of("a", 31.0 + PLACE_SECONDS) == 31.0 + PLACE_SECONDS
    assert places.taken("a").of("a", 32.0) == 32.0
    again = places.told_to_come_back("a", since=20.0, now=40.0)
    assert again.of("a", 41.0) == 10.0


def test_a_server_keeps_a_limited_number_of_places():
    places = Places()
    for number in range(MAX_PLACES + 5):
        places = places.told_to_come_back(f"peer {number}", since=1.0, now=2.0)
    assert len(places.kept) == MAX_PLACES
    later = places.told_to_come_back("late", since=99.0, now=3.0 + PLACE_SECONDS)
    assert list(later.kept) == ["late"]


@pytest.mark.parametrize(("free", "first"), [(100, "has used less"), (1, "came first")])
def test_prompts_come_in_order_of_compute_or_of_arrival_where_pages_are_short(free: int, first: str):
    """A session that was computed before is not kept out by newcomers for ever: each would take its pages."""
    begun = session(1, 0, peer="came first")
    newcomers = [session(2, 0, peer="has used less"), session(3, 0, peer="has used nothing")]
    steps = [step(begun, 16, arrived_at=NOW - 9), *(step(new, 16) for new in newcomers)]
    used = FairQueue({"came first": 2 * QUANTUM_SECONDS})
    seen = replace(view(steps, free=free), sharing=Sharing(MODEL, used=used))
    chosen = [steps[index].session for index, _ in fair(seen).chunks]
    assert [each.peer for each in chosen if each is not None][:1] == [first]
