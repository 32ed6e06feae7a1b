"""Moving in a crowd: the right number of servers goes, and each knows by itself whether it is one of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs
from shoal.policy.placement import crowd as crowd_module
from shoal.policy.placement.crowd import DRAW_SECONDS, HOLE_DRAW_SECONDS, crowd_plan
from shoal.policy.placement.plan import MAX_MOVES, plan_moves
from shoal.spans import Span

from .test_placement import machine

NUM_BLOCKS = 16
NUM_SERVERS = 480


@pytest.fixture(autouse=True)
def plans_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All servers of a crowd make the same plan: here it is made once."""

    @functools.cache
    def plan(machines: tuple[Machine, ...], num_blocks: int, now: float) -> Any:
        return plan_moves(machines, num_blocks, now=now)

    def remembered(machines: list[Machine], num_blocks: int, *, now: float, lifetimes: None) -> Any:
        return plan(tuple(machines), num_blocks, now)

    monkeypatch.setattr(crowd_module, "plan_moves", remembered)


def averages(crowd: Mapping[str, Machine]) -> list[Machine]:
    """What a histogram says of a crowd."""
    counts = Counter(each.span for each in crowd.values())
    return [machine(f"servers of {span}", str(span), count=number) for span, number in sorted(counts.items())]


def crowd_of(**shares: float) -> dict[str, Machine]:
    """`NUM_SERVERS` servers, in spans that start at these blocks with these shares of them."""
    spans = [f"{int(name[1:])}:{int(name[1:]) + 4}" for name, share in shares.items() for _ in range(int(share * 480))]
    return {f"p{index:03d}": machine(f"p{index:03d}", span) for index, span in enumerate(spans)}


def draw(crowd: Mapping[str, Machine], now: float) -> dict[str, Span]:
    """Who goes where, by what each server computes alone."""
    known = averages(crowd)
    plans = {peer: crowd_plan(peer, [own, *known], NUM_BLOCKS, now) for peer, own in crowd.items()}
    return {peer: moves[0].after for peer, moves in plans.items() if moves}


def test_a_crowd_balances_itself_and_comes_to_rest():
    crowd = crowd_of(s0=0.4, s4=0.35, s8=0.15, s12=0.1)
    least, moves = [], []
    for number in range(40):
        going = draw(crowd, number * DRAW_SECONDS)
        for peer, span in going.items():
            crowd[peer] = replace(crowd[peer], span=span)
        least.append(min(block_throughputs(list(crowd.values()), NUM_BLOCKS)))
        moves.append(len(going))
    fair = sum(each.block_speeds[0][1] for each in crowd.values()) / NUM_BLOCKS
    assert least[-1] >= 0.9 * fair
    assert sum(moves) <= 0.5 * len(crowd)  # a quarter has to move, and no more than that again did
    assert max(moves) <= 3 * MAX_MOVES
    assert sum(moves[-8:]) <= MAX_MOVES


def test_as_many_servers_go_as_the_plan_has_moves_on_average():
    crowd = crowd_of(s0=0.4, s4=0.4, s8=0.1, s12=0.1)
    planned = Counter(move.before for move in plan_moves(averages(crowd), NUM_BLOCKS, now=0.0))
    going = Counter(crowd[peer].span for number in range(12) for peer in draw(crowd, number * DRAW_SECONDS))
    for span, number in planned.items():
        assert going[span] / 12 == pytest.approx(number, rel=0.4)


def test_a_server_keeps_its_lot_while_it_waits_and_claims():
    crowd = crowd_of(s0=0.4, s4=0.4, s8=0.1, s12=0.1)
    assert draw(crowd, 0.0) == draw(crowd, DRAW_SECONDS - 1) != draw(crowd, DRAW_SECONDS)


def test_a_hole_is_filled_soon_although_few_go():
    crowd = crowd_of(s0=0.4, s4=0.3, s8=0.3)
    numbers = [len(draw(crowd, number * HOLE_DRAW_SECONDS)) for number in range(4)]
    assert 0 < sum(numbers) <= 4 * MAX_MOVES


def test_servers_that_cannot_or_must_not_move_stay():
    crowd = crowd_of(s0=0.5, s4=0.4, s8=0.1)
    winner = next(peer for peer, span in draw(crowd, 0.0).items() if len(span) > 1)
    own, known = crowd[winner], averages(crowd)
    assert crowd_plan(winner, [own, *known], NUM_BLOCKS, 0.0)
    for other in (replace(own, movable=False), replace(own, ready_at=9.0), replace(own, span=Span(1, 3))):
        assert not crowd_plan(winner, [other, *known], NUM_BLOCKS, 0.0)
    assert not crowd_plan(winner, known, NUM_BLOCKS, 0.0)
    assert not crowd_plan(winner, [replace(own, max_blocks=1), *known], NUM_BLOCKS, 0.0)
