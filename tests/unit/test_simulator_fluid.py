"""Swarms whose machines come and go in virtual time: what is true, what servers see, what they do."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.policy.machines.machine import Machine
from shoal.simulator.fluid.arrangement import EPOCH, Arrangement, Delays, Member, Scene
from shoal.simulator.fluid.measures import Meter, Worth, mean_of
from shoal.simulator.fluid.rules import Decision, Never, Rule, SharedPlan, Steward
from shoal.simulator.others.central import Central
from shoal.simulator.others.parallax import parallax
from shoal.simulator.others.petals_moves import Petals
from shoal.simulator.world.hardware import Hardware
from shoal.simulator.world.stays import Stay, volunteers
from shoal.spans import Span

FOREVER = float("inf")
LOAD = 60.0


def hardware(num_blocks: int, speed: float = 100.0) -> Hardware:
    """A machine that holds `num_blocks` blocks and loads that many in a minute."""
    return Hardware(
        num_blocks, ((1, speed), (num_blocks, speed)) if num_blocks > 1 else ((1, speed),), 1e6, LOAD / num_blocks
    )


class Scripted:
    """A rule for tests: spans by peer, and moves at given times."""

    name = "scripted"

    def __init__(self, spans: Sequence[Span], moves: dict[str, tuple[float, Span]] | None = None) -> None:
        self._spans = list(spans)
        self.moves = moves or {}
        self.views: dict[str, list[tuple[float, frozenset[str]]]] = {}

    def join(
        self, machine: Machine, others: Sequence[Machine], num_blocks: int, *, now: float, rng: random.Random
    ) -> Span:
        return self._spans.pop(0)

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward:
        return ScriptedSteward(self, peer)

    def candidates(self, machines: Sequence[Machine], num_blocks: int, *, now: float) -> None:
        return None


class ScriptedSteward:
    def __init__(self, rule: Scripted, peer: str) -> None:
        self._rule = rule
        self._peer = peer

    def look(self, own: Machine, others: Sequence[Machine], *, now: float) -> Decision:
        seen = frozenset(other.peer for other in others)
        self._rule.views.setdefault(self._peer, []).append((now - EPOCH, seen))
        at, span = self._rule.moves.get(self._peer, (FOREVER, Span(0, 1)))
        if now - EPOCH >= at:
            del self._rule.moves[self._peer]
            return Decision(goes=span)
        return Decision(look_at=EPOCH + at)

    def arrived(self, *, now: float) -> None:
        pass


def scene(
    stays: Sequence[Stay], *, num_blocks: int = 4, size: int = 2, seconds: float = 1000.0, **more: object
) -> Scene:
    values = {
        "num_blocks": num_blocks,
        "stays": stays,
        "hardware": lambda slot: hardware(size),
        "seconds": seconds,
        **more,
    }
    return Scene(**values)  # type: ignore[arg-type]


def test_a_block_without_a_server_is_a_hole_until_another_server_has_loaded_it():
    stays = [Stay(0, FOREVER, 0), Stay(0, 100, 1), Stay(0, FOREVER, 2), Stay(200, FOREVER, 3)]
    run = Arrangement(scene(stays), Scripted([Span(0, 2), Span(2, 4), Span(0, 2), Span(2, 4)]), seed=0)
    run.advance(1000)
    summary = run.summary()
    assert summary.num_holes == 2
    assert summary.heal_seconds == pytest.approx(100 + LOAD)
    assert summary.hole == pytest.approx(0.16)
    assert summary.left_over == 0
    assert summary.impossible == 0
    assert (summary.num_departures, summary.num_moves) == (1, 0)


def test_times_in_which_the_machines_cannot_hold_the_model_are_left_out():
    stays = [Stay(0, FOREVER, 0), Stay(0, 100, 1), Stay(200, FOREVER, 2)]
    run = Arrangement(scene(stays), Scripted([Span(0, 2), Span(2, 4), Span(2, 4)]), seed=0)
    run.advance(1000)
    summary = run.summary()
    assert summary.impossible == pytest.approx(0.1)
    assert summary.hole == summary.left_over == pytest.approx(LOAD / 900)
    assert summary.exact == pytest.approx((900 - LOAD) / 900)
    assert summary.heal_seconds is None


def test_shares_are_averages_over_time_from_the_end_of_the_warm_up():
    meter = Meter(1, begins=100.0)
    meter.online(Span(0, 1), now=0.0)
    meter.worth(Worth(exact=10, minimum=5, bound=10, num_machines=2, copies=3), now=0.0)
    meter.worth(Worth(exact=5, minimum=5, bound=10, num_machines=1, copies=3), now=150.0)
    meter.offline(Span(0, 1), now=190.0)
    meter.worth(Worth(exact=0, minimum=0, bound=10, num_machines=1, copies=3), now=190.0)
    summary = meter.summary(now=200.0)
    assert summary.exact == pytest.approx(0.5 * 1.0 + 0.4 * 0.5)
    assert summary.minimum == pytest.approx(0.9 * 0.5)
    assert summary.hole == pytest.approx(0.1)
    assert summary.num_machines == pytest.approx(1.5)
    assert summary.num_holes == 1
    assert mean_of([summary, summary]).exact == pytest.approx(summary.exact)


def test_watchers_miss_a_vanished_server_at_once_and_others_when_its_record_expires():
    stays = [Stay(0, 100, 0), *(Stay(0, FOREVER, slot) for slot in range(1, 4))]
    rule = Scripted([Span(0, 2), Span(2, 4), Span(2, 4), Span(2, 4)])
    delays = Delays(view=10.0, watched=16, noticed=2.0, vanish=50.0)
    run = Arrangement(scene(stays, delays=delays), rule, seed=0)
    run.advance(300)
    for views in (rule.views[f"s{index:06d}"] for index in (1, 2, 3)):
        assert min(at for at, seen in views if "s000000" not in seen and at > 0) == pytest.approx(102.0)
    rule = Scripted([Span(0, 2), Span(2, 4), Span(2, 4), Span(2, 4)])
    run = Arrangement(scene(stays, delays=Delays(view=10.0, watched=0, vanish=50.0)), rule, seed=0)
    run.advance(300)
    for views in (rule.views[f"s{index:06d}"] for index in (1, 2, 3)):
        assert 150.0 <= min(at for at, seen in views if "s000000" not in seen and at > 0) <= 160.0


def test_a_server_that_moves_serves_while_it_hands_over_and_not_while_it_loads():
    stays = [Stay(0, FOREVER, slot) for slot in range(3)]
    rule = Scripted([Span(0, 2), Span(2, 4), Span(2, 4)], {"s000002": (500.0, Span(0, 2))})
    run = Arrangement(scene(stays, delays=Delays(handover=5.0)), rule, seed=0)
    served: list[tuple[float, int]] = []
    for at in (499.0, 504.0, 506.0, 564.0, 566.0):
        run.advance(at)
        served.append((at, sum(member.online for member in run.members.values())))
    assert served == [(499.0, 3), (504.0, 3), (506.0, 2), (564.0, 2), (566.0, 3)]
    assert run.members["s000002"].span == Span(0, 2)
    assert run.summary().num_moves == 1


def test_a_claim_is_seen_by_others_and_can_be_withdrawn():
    class Claiming(ScriptedSteward):
        def look(self, own: Machine, others: Sequence[Machine], *, now: float) -> Decision:
            claims = Span(0, 2) if 100 <= now - EPOCH < 200 and self._peer == "s000001" else None
            return Decision(claims=claims, look_at=EPOCH + (100 if now < EPOCH + 100 else 200))

    class Rule(Scripted):
        def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward:
            return Claiming(self, peer)

    run = Arrangement(scene([Stay(0, FOREVER, 0), Stay(0, FOREVER, 1)]), Rule([Span(0, 2), Span(2, 4)]), seed=0)
    spans = {}
    for at in (90.0, 110.0, 210.0):
        run.advance(at)
        spans[at] = {machine.peer: (machine.span, machine.movable) for machine in run.board.machines}["s000001"]
    assert spans == {90.0: (Span(2, 4), True), 110.0: (Span(0, 2), False), 210.0: (Span(2, 4), True)}
    assert run.summary().hole == 0


class NoMoveOpensAHole(SharedPlan):
    """The shared plan, watched: what a server gives up when it sets out, others serve at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.online_spans: dict[str, Span] = {}
        self.num_moves = 0

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward:
        return WatchedSteward(super().steward(peer, num_blocks, rng), self)

    def online(self, member: Member) -> None:
        self.online_spans[member.peer] = member.span

    def handing_over(self, member: Member) -> None:
        pass

    def stopped(self, member: Member) -> None:
        del self.online_spans[member.peer]


class WatchedSteward:
    def __init__(self, steward: Steward, world: NoMoveOpensAHole) -> None:
        self._steward = steward
        self._world = world

    def look(self, own: Machine, others: Sequence[Machine], *, now: float) -> Decision:
        decision = self._steward.look(own, others, now=now)
        if decision.goes is not None:
            self._world.num_moves += 1
            given_up = set(own.span or ()) - set(own.keeps(decision.goes) or ())
            elsewhere = {block for peer, span in self._world.online_spans.items() if peer != own.peer for block in span}
            assert given_up <= elsewhere, f"{own.peer} is the only server of {given_up - elsewhere}"
        return decision

    def arrived(self, *, now: float) -> None:
        self._steward.arrived(now=now)


def churning(seed: int, *, num_machines: int = 10, seconds: float = 1800.0) -> Scene:
    rng = random.Random(seed)
    stays = volunteers(rng, num_machines=num_machines, mean_life=1200.0, seconds=seconds)
    sizes = {stay.slot: rng.randint(1, 4) for stay in stays}
    # Without late views: a server may leave blocks to another one that it does not know to be gone.
    delays = Delays(view=5.0, cohorts=1, noticed=0.0, vanish=0.0)
    return Scene(8, stays, lambda slot: hardware(sizes[slot]), seconds, delays=delays)


@given(st.integers(0, 10_000))
@settings(max_examples=5, deadline=None)
def test_no_server_that_follows_the_shared_plan_opens_a_hole_by_moving(seed):
    rule = NoMoveOpensAHole()
    run = Arrangement(churning(seed), rule, seed=seed, watchers=[rule])
    run.advance(1800)
    assert rule.num_moves == run.summary().num_moves


def test_servers_that_follow_the_shared_plan_move():
    run = Arrangement(churning(7), SharedPlan(), seed=7)
    run.advance(1800)
    assert run.summary().num_moves > 0


@pytest.mark.parametrize(
    "rule", [Never, Petals, SharedPlan, lambda: SharedPlan(predicts=True), lambda: Central("Parallax", parallax)]
)
def test_equal_seeds_give_equal_runs(rule):
    def summary() -> object:
        run = Arrangement(churning(7), rule(), seed=7)
        run.advance(1800)
        return run.summary()

    assert summary() == summary()


def test_the_shared_plan_heals_a_hole_that_stays_without_moves():
    stays = [Stay(0, FOREVER, slot) for slot in range(5)] + [Stay(0, 600, slot) for slot in (5, 6)]
    summaries = {}
    for rule in (Never(), SharedPlan()):
        run = Arrangement(scene(stays, num_blocks=6, seconds=3600.0), Lopsided(rule), seed=0)
        run.advance(3600)
        summaries[rule.name] = run.summary()
    assert summaries["no moves"].hole == pytest.approx(3000 / 3600, rel=0.01)
    assert summaries["shared plan"].hole < 0.05
    assert summaries["shared plan"].heal_seconds is not None
    assert summaries["shared plan"].heal_seconds <= LOAD + 10


class Lopsided:
    """Another rule's moves, after a beginning in which the last two servers are the only ones of two blocks."""

    def __init__(self, rule: Rule) -> None:
        self.name = rule.name
        self._rule = rule
        self._spans = [Span(0, 2), Span(0, 2), Span(2, 4), Span(2, 4), Span(2, 4), Span(4, 6), Span(4, 6)]

    def join(
        self, machine: Machine, others: Sequence[Machine], num_blocks: int, *, now: float, rng: random.Random
    ) -> Span:
        return self._spans[int(machine.peer[1:])]

    def steward(self, peer: str, num_blocks: int, rng: random.Random) -> Steward | None:
        return self._rule.steward(peer, num_blocks, rng)

    def candidates(self, machines: Sequence[Machine], num_blocks: int, *, now: float) -> Set[str] | None:
        return self._rule.candidates(machines, num_blocks, now=now)


def test_asking_only_the_servers_that_a_plan_names_changes_nothing():
    rng = random.Random(5)
    stays = volunteers(rng, num_machines=10, mean_life=1200.0, seconds=1800.0)
    sizes = {stay.slot: rng.randint(1, 4) for stay in stays}
    delays = Delays(cohorts=1, watched=0)
    found = []
    for selective in (False, True):
        run = Arrangement(
            Scene(8, stays, lambda slot: hardware(sizes[slot]), 1800.0, delays=delays),
            SharedPlan(selective=selective),
            seed=5,
        )
        run.advance(1800)
        found.append(run.summary())
    assert found[0].num_moves > 0
    assert found[1].num_moves == found[0].num_moves
    assert found[1].exact == pytest.approx(found[0].exact)
