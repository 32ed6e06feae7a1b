"""Persons that compete for servers: what those get who serve, and those who only sign."""

from __future__ import annotations

import pytest

from shoal.simulator.studies.contenders import KINDS, Kind, Outcome, study

GIVER, _, TAKER, RING, WHITEWASHER, _ = KINDS


@pytest.fixture(scope="module")
def found() -> dict[Kind, Outcome]:
    outcomes = study(seed=0, kinds=(GIVER, TAKER, RING, WHITEWASHER), per_kind=3, seconds=1500.0)
    return {each.kind: each for each in outcomes}


def test_who_serves_gets_more_of_the_compute_and_waits_less(found: dict[Kind, Outcome]) -> None:
    assert found[GIVER].rate > 1.5 * found[TAKER].rate
    assert found[GIVER].wait < found[TAKER].wait


@pytest.mark.parametrize("kind", [RING, WHITEWASHER])
def test_identities_that_give_nothing_get_no_more_than_one_that_takes(found: dict[Kind, Outcome], kind: Kind) -> None:
    assert found[kind].rate < 1.1 * found[TAKER].rate


def test_who_only_takes_keeps_a_share(found: dict[Kind, Outcome]) -> None:
    equal = sum(each.rate for each in found.values()) / len(found)
    assert found[TAKER].rate > 0.5 * equal


def test_without_weights_all_get_the_same() -> None:
    giver, taker = study(seed=0, kinds=(GIVER, TAKER), per_kind=3, seconds=800.0, with_weights=False)
    assert giver.rate == pytest.approx(taker.rate, rel=0.1)
