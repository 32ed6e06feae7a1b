"""Whether others can dial a peer, judged by what they say; and how that is told to its operator."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.net.addressing.reach_words import in_words, seen_host
from shoal.policy.network.reachability import (
    ALL_REQUESTS,
    PEER_REQUESTS,
    REPORT_SECONDS,
    WINDOW_SECONDS,
    DialAllowance,
    DialReport,
    Reach,
    Reachability,
    choose_examiners,
    is_dialable,
    judged,
    latest,
    wants_relays,
)

OWN = ("/ip4/192.168.1.2/tcp/4001/p2p/own",)


def report(examiner: str, *, came: bool, outside: bool = True, at: float = 0.0) -> DialReport:
    return DialReport(examiner, at, dialled=OWN, reached=OWN if came else (), is_outside=outside)


reports = st.lists(
    st.builds(
        lambda number, came, outside, at: report(f"p{number}", came=came, outside=outside, at=at),
        st.integers(0, 6),
        st.booleans(),
        st.booleans(),
        st.floats(0, 2 * REPORT_SECONDS),
    ),
    max_size=12,
)


def test_without_reports_nothing_is_known():
    assert is_dialable([]) is None
    assert judged([], (), has_named_relays=False).kind is Reachability.UNKNOWN


def test_a_neighbor_on_the_lan_does_not_speak_for_those_outside():
    inside = report("neighbor", came=True, outside=False)
    assert is_dialable([inside])
    assert not is_dialable([inside, report("far", came=False)])
    assert is_dialable([report("neighbor", came=False, outside=False), report("far", came=True)])


def test_one_liar_among_several_decides_nothing():
    assert is_dialable([report("liar", came=False), report("a", came=True), report("b", came=True)])
    assert not is_dialable([report("liar", came=True), report("a", came=False), report("b", came=False)])


@pytest.mark.parametrize(
    ("came", "relays", "named", "kind"),
    [
        (True, (), False, Reachability.DIRECT),
        (False, (), False, Reachability.UNREACHABLE),
        (False, ("r",), False, Reachability.RELAYED),
        (True, ("r",), True, Reachability.RELAYED),  # the operator says that others cannot dial it
        (True, (), True, Reachability.UNREACHABLE),
    ],
)
def test_a_peer_that_cannot_be_dialled_is_reached_by_its_relays_or_not_at_all(came, relays, named, kind):
    reach = judged([report("a", came=came)], relays, has_named_relays=named)
    assert reach.kind is kind
    assert wants_relays(reach, has_named_relays=named) == (kind is not Reachability.DIRECT)


@given(reports, st.floats(0, 3 * REPORT_SECONDS))
def test_of_each_examiner_the_latest_report_counts_for_a_while(found: list[DialReport], now: float):
    kept = latest(found, now=now)
    assert len({each.examiner for each in kept}) == len(kept)
    for each in kept:
        assert each.at > now - REPORT_SECONDS
        assert each.at == max(other.at for other in found if other.examiner == each.examiner)
    assert latest(kept, now=now) == kept


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.booleans(), max_size=9), reports, st.integers())
def test_examiners_from_outside_come_first_and_of_these_such_as_have_not_reported(
    known: dict[str, bool], found: list[DialReport], seed: int
):
    chosen = choose_examiners(known, found, random.Random(seed))
    assert len(chosen) == len(set(chosen)) == min(3, len(known))
    assert sum(known[peer] for peer in chosen) == min(3, sum(known.values()))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 20)), max_size=150))
def test_requests_to_be_dialled_are_answered_within_limits(requests: list[tuple[str, float]]):
    allowance, now, granted = DialAllowance(), 0.0, []
    for peer, pause in requests:
        now += pause
        more = allowance.grant(peer, now=now)
        if more is not None:
            allowance = more
            granted.append((now, peer))
        recent = [each for at, each in granted if at > now - WINDOW_SECONDS]
        assert len(recent) <= ALL_REQUESTS
        assert recent.count(peer) <= PEER_REQUESTS
        assert more is not None or len(recent) == ALL_REQUESTS or recent.count(peer) == PEER_REQUESTS


def test_the_operator_is_told_which_port_to_open_and_what_to_announce():
    seen = [
        replace(report("a", came=False), seen_at="/ip4/93.184.216.34/tcp/55555"),
        replace(report("b", came=False), seen_at="/ip4/93.184.216.34/tcp/55556"),
        replace(report("c", came=False), seen_at="/ip4/192.168.1.2/tcp/4001", is_outside=False),
    ]
    text = in_words(Reach(Reachability.UNREACHABLE, tuple(seen)), OWN)
    assert "2 peers outside of its network tried" in text
    assert "open TCP port 4001 in the router and use --port 4001 --announce /ip4/93.184.216.34/tcp/4001" in text


def test_behind_a_firewall_of_its_own_the_port_is_to_be_opened_there():
    lan = replace(report("a", came=False, outside=False), seen_at=OWN[0])
    text = in_words(Reach(Reachability.UNREACHABLE, (lan,)), OWN)
    assert text.endswith("open TCP port 4001 in the firewall of this machine")


def test_an_examiner_cannot_put_a_name_into_the_advice():
    lie = replace(report("liar", came=False), seen_at="/dns4/evil.example/tcp/1")
    assert seen_host([lie]) is None
    assert "evil" not in in_words(Reach(Reachability.UNREACHABLE, (lie,)), OWN)


@pytest.mark.parametrize("kind", list(Reachability))
def test_every_kind_has_its_words(kind: Reachability):
    text = in_words(Reach(kind, (report("a", came=kind is Reachability.DIRECT),), ("relay",)), OWN)
    assert text
    assert ("open TCP port" in text) == (kind is Reachability.UNREACHABLE)
