"""What one server does about the shared plan, and how servers that start together spread."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from shoal.policy.machines.machine import Machine
from shoal.policy.placement.mover import (
    CLAIM_SECONDS,
    PLAN_ANYWAY,
    PLAN_EVERY,
    QUIET_PLAN_ANYWAY,
    REST_SECONDS,
    Mover,
    Phase,
)
from shoal.spans import Span

from .test_placement import machine

NUM_BLOCKS = 8
TRIPLE = [machine("a", "0:4"), machine("b", "0:4"), machine("c", "0:4")]


def claim(one: Machine, span: Span, now: float) -> Machine:
    return replace(one, span=span, kept=one.keeps(span), ready_at=now + 60, movable=False)


def test_a_server_claims_a_hole_looks_again_and_goes():
    mover = Mover("a", NUM_BLOCKS).after_view(TRIPLE, now=0.0)
    assert (mover.phase, mover.claim, mover.move) == (Phase.CLAIMED, Span(4, 8), None)
    mover = mover.after_view([*TRIPLE, claim(TRIPLE[0], Span(4, 8), 0.0)], now=mover.next_look_at)
    assert mover.phase is Phase.MOVING
    assert mover.move is not None
    assert mover.move.reason == "blocks 4:8 had no server"
    mover = mover.arrived(now=100.0)
    assert (mover.phase, mover.claim, mover.move) == (Phase.WATCHING, None, None)


def test_a_server_that_is_not_in_the_plan_watches():
    mover = Mover("c", NUM_BLOCKS).after_view(TRIPLE, now=0.0)
    assert (mover.phase, mover.claim) == (Phase.WATCHING, None)


def test_the_second_server_of_a_plan_waits_before_it_claims():
    machines = [machine(name, "0:4") for name in "abcd"]
    second = Mover("b", 12).after_view(machines, now=0.0)
    assert second.phase is Phase.WAITING
    assert second.claim is None
    assert second.after_view(machines, now=second.next_look_at - 0.1) == second
    assert second.after_view(machines, now=second.next_look_at).phase is Phase.CLAIMED


def test_a_server_gives_up_a_claim_when_the_plan_has_it_no_more():
    mover = Mover("b", NUM_BLOCKS).after_view(TRIPLE[1:], now=0.0)
    assert mover.phase is Phase.CLAIMED
    filled = [*TRIPLE[1:], machine("new", "4:8", 400, ready_at=50.0, movable=False)]
    assert mover.after_view(filled, now=mover.next_look_at).phase is Phase.WATCHING


def test_of_two_servers_that_claim_the_same_blocks_the_lower_peer_id_goes():
    # each was alone in its view at first, so both are at the moment before they go
    first = Mover("a", NUM_BLOCKS).after_view([TRIPLE[0], TRIPLE[2]], now=0.0)
    second = Mover("b", NUM_BLOCKS).after_view([TRIPLE[1], TRIPLE[2]], now=0.0)
    assert first.claim == second.claim == Span(4, 8)
    view = [*TRIPLE, claim(TRIPLE[0], Span(4, 8), 0.0), claim(TRIPLE[1], Span(4, 8), 0.0)]
    assert first.after_view(view, now=CLAIM_SECONDS).phase is Phase.MOVING
    assert second.after_view(view, now=CLAIM_SECONDS).claim != Span(4, 8)


def test_two_servers_that_both_count_on_the_other_do_not_both_leave():
    pair = [machine("a", "0:4"), machine("b", "0:4")]
    first = Mover("a", 12).after_view([*pair, machine("x", "8:12")], now=0.0)
    second = Mover("b", 12).after_view([replace(pair[0], peer="z"), pair[1], machine("x", "4:8")], now=0.0)
    assert first.phase is second.phase is Phase.CLAIMED
    view = [*pair, claim(pair[0], Span(4, 8), 0.0), claim(pair[1], Span(8, 12), 0.0)]
    phases = [mover.after_view(view, now=CLAIM_SECONDS).phase for mover in (first, second)]
    assert phases == [Phase.MOVING, Phase.WATCHING]


def test_a_server_plans_at_most_every_ten_seconds_and_only_when_something_changed():
    plans = []
    full = [*TRIPLE, machine("d", "4:8")]

    def planner(machines: Sequence[Machine], num_blocks: int, now: float, lifetimes: object) -> tuple[()]:
        plans.append(now)
        return ()

    mover = Mover("a", NUM_BLOCKS, planner=planner)
    for second in range(60):
        machines = full if second < 30 else full[1:]
        mover = mover.after_view(machines, now=float(second))
    assert plans == [0.0, 30.0]
    for second in range(60, 100):
        mover = mover.after_view(full[second % 3 :], now=float(second))
    assert all(later - earlier >= PLAN_EVERY for earlier, later in itertools.pairwise(plans))
    assert len(plans) == 6


def test_a_hole_is_planned_for_at_once():
    plans = []

    def planner(machines: Sequence[Machine], num_blocks: int, now: float, lifetimes: object) -> tuple[()]:
        plans.append(now)
        return ()

    mover = Mover("a", NUM_BLOCKS, planner=planner).after_view([*TRIPLE, machine("d", "4:8")], now=0.0)
    mover.after_view(TRIPLE, now=1.5)
    assert plans == [0.0, 1.5]


def test_after_a_move_a_server_rests_but_not_from_holes():
    balance = [
        *(machine(f"fast{i}", "0:4", 100) for i in range(5)),
        *(machine(f"slow{i}", "4:8", 40) for i in range(2)),
    ]
    rested = Mover("fast0", NUM_BLOCKS).arrived(now=0.0)
    assert rested.after_view(balance, now=20.0).phase is Phase.WATCHING
    assert rested.after_view(balance, now=REST_SECONDS + 1).phase is Phase.CLAIMED
    assert rested.after_view(balance[:5], now=20.0).phase is Phase.CLAIMED


def test_a_server_whose_move_failed_watches_again():
    mover = Mover("a", NUM_BLOCKS).after_view(TRIPLE, now=0.0)
    mover = mover.after_view(TRIPLE, now=mover.next_look_at)
    assert mover.failed(now=9.0).phase is Phase.WATCHING


# Many servers in virtual time. What a server announces, another sees some time later.


@dataclass
class World:
    """Servers and their records; each server sees those of others as they were `delay` seconds ago."""

    num_blocks: int
    delays: dict[str, float]
    history: dict[str, list[tuple[float, tuple[Machine, ...]]]] = field(default_factory=dict)

    def announce(self, peer: str, now: float, *records: Machine) -> None:
        self.history.setdefault(peer, []).append((now, records))

    def view(self, peer: str, now: float) -> list[Machine]:
        found: list[Machine] = []
        for other, versions in self.history.items():
            seen_at = now if other == peer else now - self.delays[peer]
            known = [records for when, records in versions if when <= seen_at]
            found.extend(known[-1] if known else ())
        return found

    def holes(self, now: float) -> set[int]:
        held = {
            block
            for versions in self.history.values()
            for record in [records for when, records in versions if when <= now][-1]
            if record.span is not None
            for block in record.span
        }
        return set(range(self.num_blocks)) - held


@pytest.mark.parametrize("seed", range(8))
def test_servers_with_delayed_views_fill_holes_and_open_none(seed: int):
    rng = random.Random(seed)
    num_blocks = 16
    servers = {f"s{index:02d}": machine(f"s{index:02d}", max_blocks=6, load_seconds=5.0) for index in range(9)}
    starts = [rng.randrange(num_blocks - 6) for _ in servers]
    world = World(num_blocks, {peer: rng.uniform(0.0, CLAIM_SECONDS / 2 - 0.1) for peer in servers})
    for (peer, one), start in zip(servers.items(), starts, strict=True):
        world.announce(peer, -100.0, replace(one, span=Span(start, start + rng.randint(4, 6))))
    movers = {peer: Mover(peer, num_blocks) for peer in servers}
    online = {peer: world.history[peer][0][1][0].span for peer in servers}
    ready: dict[str, float] = {}
    served = {block for span in online.values() if span for block in span}
    for tick in range(600):
        now = tick + rng.random() / 2
        for peer in servers:
            if ready.get(peer, now + 1) <= now:
                del ready[peer]
                move = movers[peer].move
                assert move is not None
                online[peer] = move.after
                movers[peer] = movers[peer].arrived(now=now)
                world.announce(peer, now, replace(servers[peer], span=move.after))
            before = movers[peer]
            after = movers[peer] = before.after_view(world.view(peer, now), now=now)
            own = online[peer]
            if own is None:
                continue
            serving = replace(servers[peer], span=own)
            if after.move is not None and before.move is None:
                kept = serving.keeps(after.move.after)
                online[peer] = None if kept is None else own
                ready[peer] = now + 30
                loading = replace(serving, span=after.move.after, kept=kept, ready_at=now + 30, movable=False)
                world.announce(peer, now, loading)
            elif after.claim != before.claim:
                world.announce(peer, now, serving, *([claim(serving, after.claim, now)] if after.claim else []))
        covered = {block for span in online.values() if span for block in span}
        assert served <= covered
        served = covered
    assert served == set(range(num_blocks))


@pytest.mark.parametrize(("now", "seconds"), [(1000.0, PLAN_ANYWAY), (1e6, QUIET_PLAN_ANYWAY)])
def test_where_nothing_changes_a_server_plans_again_after_a_while_and_seldom_in_a_quiet_swarm(
    now: float, seconds: float
):
    balanced = [machine("a", "0:4"), machine("b", "4:8")]
    settled = Mover("a", NUM_BLOCKS).after_view(balanced, now=now)
    assert settled.next_look_at == now + seconds
    again = settled.after_view(balanced, now=now + seconds - 1)
    assert (again.planned_at, again.next_look_at) == (now, now + seconds)
    assert settled.after_view(balanced, now=now + seconds).planned_at == now + seconds
