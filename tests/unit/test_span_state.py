"""The state of a server's blocks: whatever happens, in whatever order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.peers import ServerState
from shoal.policy.placement.joining import Placed
from shoal.server.placing.span_state import AVOIDED_SECONDS, SpanPhase, SpanState
from shoal.spans import Span

OLD, NEW = Placed(Span(0, 4), "no server has them"), Placed(Span(4, 8), "they are slow")
spans = st.builds(lambda start, length: Span(start, start + length), st.integers(0, 6), st.integers(1, 4))
placed = st.builds(Placed, spans, st.sampled_from(("a hole", "slow blocks")))


def serving(at: Placed = OLD) -> SpanState:
    return SpanState().claimed(at).confirmed(ready_at=1.0).loaded()


class Life(RuleBasedStateMachine):
    """A server that does whatever it may do in each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.state = SpanState()
        self.now = 1000.0
        self.failed: dict[Span, float] = {}

    def can(self, *phases: SpanPhase) -> bool:
        return self.state.phase in phases

    @rule(seconds=st.floats(0, 2 * AVOIDED_SECONDS))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.can(SpanPhase.CHOOSING, SpanPhase.CLAIMING, SpanPhase.SERVING))
    @rule(wanted=placed)
    def claims(self, wanted: Placed) -> None:
        held = self.state.held
        self.state = self.state.claimed(wanted)
        assert self.state.held == held

    @precondition(lambda self: self.can(SpanPhase.CLAIMING, SpanPhase.EXTENDING))
    @rule()
    def gives_the_claim_up(self) -> None:
        held = self.state.held
        self.state = self.state.unclaimed()
        assert self.state.phase is (SpanPhase.CHOOSING if held is None else SpanPhase.SERVING)

    @precondition(lambda self: self.can(SpanPhase.CLAIMING))
    @rule()
    def confirms(self) -> None:
        self.state = self.state.confirmed(ready_at=self.now + 10)
        assert self.can(SpanPhase.LOADING if self.state.held is None else SpanPhase.DRAINING)

    @precondition(lambda self: self.can(SpanPhase.CLAIMING) and self.state.held is not None)
    @rule()
    def confirms_beside_what_it_holds(self) -> None:
        held = self.state.held
        self.state = self.state.confirmed(ready_at=self.now + 10, extends=True)
        assert self.can(SpanPhase.EXTENDING)
        assert self.state.held == held

    @precondition(lambda self: self.can(SpanPhase.DRAINING))
    @rule()
    def drains(self) -> None:
        self.state = self.state.drained()

    @precondition(lambda self: self.can(SpanPhase.LOADING, SpanPhase.EXTENDING))
    @rule()
    def loads(self) -> None:
        wanted = self.state.wanted
        self.state = self.state.loaded()
        assert self.state.held == wanted

    @precondition(lambda self: self.can(SpanPhase.LOADING, SpanPhase.EXTENDING))
    @rule()
    def fails(self) -> None:
        assert self.state.wanted is not None
        held, before, span = self.state.held, self.state.before, self.state.wanted.span
        self.failed[span] = self.now
        self.state = self.state.failed("no memory", now=self.now)
        assert self.state.avoids(span, now=self.now)
        if held is not None:
            assert self.can(SpanPhase.SERVING)
            assert self.state.held == held
        elif before is not None and self.state.phase is SpanPhase.LOADING:
            assert self.state.wanted is not None
            assert self.state.wanted.span == before.span

    @invariant()
    def it_wants_blocks_as_long_as_it_does_not_have_them(self) -> None:
        changes = (SpanPhase.CLAIMING, SpanPhase.DRAINING, SpanPhase.LOADING, SpanPhase.EXTENDING)
        assert (self.state.wanted is not None) == self.can(*changes)

    @invariant()
    def it_holds_blocks_while_it_loads_only_if_it_extends_them(self) -> None:
        if self.can(SpanPhase.LOADING, SpanPhase.CHOOSING):
            assert self.state.held is None
        if self.can(SpanPhase.SERVING, SpanPhase.DRAINING, SpanPhase.EXTENDING):
            assert self.state.held is not None

    @invariant()
    def it_is_online_exactly_while_it_serves_and_goes_on_serving(self) -> None:
        announced = self.state.announced
        is_online = announced is not None and announced[1] is ServerState.ONLINE
        claims = self.can(SpanPhase.CLAIMING) and self.state.held is not None
        assert is_online == (claims or self.can(SpanPhase.SERVING, SpanPhase.EXTENDING))
        wanted = None if self.state.wanted is None else self.state.wanted.span
        assert self.state.wants == (wanted if is_online else None)
        if is_online:
            assert announced is not None
            assert self.state.held is not None
            assert announced[0] == self.state.held.span

    @invariant()
    def it_says_when_it_will_be_ready_exactly_after_its_claim_was_confirmed(self) -> None:
        loads = (SpanPhase.DRAINING, SpanPhase.LOADING, SpanPhase.EXTENDING)
        assert (self.state.ready_at is not None) == self.can(*loads)

    @invariant()
    def it_rests_for_a_while_after_a_failure(self) -> None:
        recent = any(at + AVOIDED_SECONDS > self.now for at in self.failed.values())
        assert self.state.is_resting(now=self.now) == recent

    @invariant()
    def it_always_can_leave(self) -> None:
        left = self.state.leaving()
        assert not left.answers
        assert left.announced is None or left.announced[1] is ServerState.LEAVING


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)

STEPS: dict[str, Callable[[SpanState], SpanState]] = {
    "claimed": lambda state: state.claimed(NEW),
    "unclaimed": lambda state: state.unclaimed(),
    "confirmed": lambda state: state.confirmed(ready_at=5.0),
    "extends": lambda state: state.confirmed(ready_at=5.0, extends=True),
    "drained": lambda state: state.drained(),
    "loaded": lambda state: state.loaded(),
    "failed": lambda state: state.failed("no memory", now=0.0),
}
ALLOWED = {
    SpanPhase.CHOOSING: {"claimed"},
    SpanPhase.CLAIMING: {"claimed", "unclaimed", "confirmed", "extends"},
    SpanPhase.EXTENDING: {"loaded", "failed", "unclaimed"},
    SpanPhase.DRAINING: {"drained"},
    SpanPhase.LOADING: {"loaded", "failed"},
    SpanPhase.SERVING: {"claimed"},
    SpanPhase.LEAVING: set[str](),
}


@given(st.lists(st.sampled_from([*STEPS]), max_size=12))
def test_a_transition_that_a_phase_does_not_allow_is_refused(steps: list[str]):
    state = SpanState()
    for step in steps:
        if step in ALLOWED[state.phase]:
            state = STEPS[step](state)
        else:
            with pytest.raises(ValueError, match="not possible while"):
                STEPS[step](state)


@pytest.mark.parametrize("step", STEPS)
def test_a_server_that_leaves_does_nothing_else(step: str):
    with pytest.raises(ValueError, match="not possible while leaving"):
        STEPS[step](serving().leaving())


def test_a_move_that_fails_ends_where_it_began_and_says_why():
    state = serving().claimed(NEW).confirmed(ready_at=9.0).drained().failed("the disk is full", now=100.0)
    assert state.announced == (OLD.span, ServerState.JOINING)
    assert "the disk is full" in state.reason
    assert state.loaded().announced == (OLD.span, ServerState.ONLINE)
    assert state.avoids(NEW.span, now=100.0 + AVOIDED_SECONDS - 1)
    assert not state.avoids(NEW.span, now=100.0 + AVOIDED_SECONDS)


def test_a_server_that_extends_its_blocks_serves_them_until_it_has_the_others():
    state = serving().claimed(NEW)
    assert (state.announced, state.wants, state.ready_at) == ((OLD.span, ServerState.ONLINE), NEW.span, None)
    state = state.confirmed(ready_at=9.0, extends=True)
    assert (state.announced, state.wants, state.ready_at) == ((OLD.span, ServerState.ONLINE), NEW.span, 9.0)
    failed = state.failed("the disk is full", now=100.0)
    assert (failed.announced, failed.wants) == ((OLD.span, ServerState.ONLINE), None)
    assert failed.avoids(NEW.span, now=101.0)
    assert state.loaded().announced == (NEW.span, ServerState.ONLINE)


def test_a_server_that_cannot_load_its_old_blocks_either_has_to_choose():
    moved = serving().claimed(NEW).confirmed(ready_at=9.0).drained()
    state = moved.failed("the disk is full", now=100.0).failed("the disk is full", now=101.0)
    assert state.phase is SpanPhase.CHOOSING
    assert state.announced == (OLD.span, ServerState.LEAVING)
    assert state.avoids(OLD.span, now=102.0)
    assert state.avoids(NEW.span, now=102.0)


def test_a_larger_span_around_one_that_failed_is_avoided_too():
    state = SpanState().claimed(NEW).confirmed(ready_at=9.0).failed("no memory", now=0.0)
    assert state.avoids(Span(3, 8), now=1.0)
    assert not state.avoids(Span(5, 8), now=1.0)
