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
    EXAMINERS,
    PEER_REQUESTS,
    REPORT_SECONDS,
    WINDOW_SECONDS,
    DialAllowance,
    DialReport,
    Reach,
    Reachability,
    by_other_machines,
    choose_examiners,
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


def kind_of(*found: DialReport, relayed: tuple[str, ...] = (), named: bool = False) -> Reachability:
    return judged(found, relayed, has_named_relays=named).kind


def test_without_reports_nothing_is_known():
    assert kind_of() is Reachability.UNKNOWN
    assert not wants_relays([])


def test_a_neighbor_on_the_lan_does_not_speak_for_those_outside():
    inside = report("neighbor", came=True, outside=False)
    assert kind_of(inside) is Reachability.DIRECT
    assert wants_relays([inside, report("far", came=False)])


def test_what_comes_through_from_the_same_machine_proves_nothing_and_what_does_not_counts():
    here, neighbor = report("here", came=True, outside=False), report("neighbor", came=False, outside=False)
    assert kind_of(here, neighbor) is Reachability.DIRECT
    both, alone = judged([here, neighbor], (), has_named_relays=False), judged([here], (), has_named_relays=False)
    assert by_other_machines(both, {"here"}, has_named_relays=False).reports == (neighbor,)
    assert by_other_machines(both, {"here"}, has_named_relays=False).kind is Reachability.UNREACHABLE
    assert by_other_machines(alone, {"here"}, has_named_relays=False).kind is Reachability.UNKNOWN
    stuck = judged([report("here", came=False, outside=False)], (), has_named_relays=False)
    assert by_other_machines(stuck, {"here"}, has_named_relays=False) == stuck
    assert not wants_relays([report("neighbor", came=False, outside=False), report("far", came=True)])


def test_one_peer_outside_does_not_take_a_server_from_its_neighbors():
    inside = [report(f"neighbor{number}", came=True, outside=False) for number in range(3)]
    assert kind_of(*inside, report("far", came=False)) is Reachability.DIRECT
    assert kind_of(*inside, report("far", came=False), relayed=("r",)) is Reachability.RELAYED
    assert kind_of(*inside, report("far", came=False), report("other", came=False)) is Reachability.UNREACHABLE


def test_one_liar_among_several_decides_nothing():
    assert kind_of(report("liar", came=False), report("a", came=True), report("b", came=True)) is Reachability.DIRECT
    few = (report("liar", came=True), report("a", came=False), report("b", came=False))
    assert kind_of(*few) is Reachability.UNREACHABLE


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
    assert kind_of(report("a", came=came), relayed=relays, named=named) is kind


@given(reports)
def test_of_each_examiner_the_latest_report_counts_until_there_are_much_later_ones(found: list[DialReport]):
    kept = latest(found)
    assert len({each.examiner for each in kept}) == len(kept)
    assert bool(kept) == bool(found)  # while no examiner answers, what was found last holds
    newest = max((each.at for each in found), default=0.0)
    for each in found:
        is_latest = each.at == max(other.at for other in found if other.examiner == each.examiner)
        assert (
            (each.examiner in {other.examiner for other in kept}) or not is_latest or each.at <= newest - REPORT_SECONDS
        )
    assert latest(kept) == kept


names = st.sampled_from([f"p{number}" for number in range(7)])


@given(st.dictionaries(names, st.booleans()), st.dictionaries(names, st.floats(0, 100)), st.integers())
def test_examiners_take_turns_and_those_outside_come_first(
    known: dict[str, bool], asked_at: dict[str, float], seed: int
):
    chosen = choose_examiners(known, asked_at, random.Random(seed))
    assert len(chosen) == len(set(chosen)) == min(EXAMINERS, len(known))
    left = known.keys() - set(chosen)
    for one in chosen:
        for other in left:
            one_at, other_at = (asked_at.get(each, -1.0) for each in (one, other))
            assert one_at < other_at or (one_at == other_at and known[one] >= known[other])


def test_peers_that_never_answer_do_not_keep_others_from_being_asked():
    known, asked_at, asked = dict.fromkeys(["a", "b", "c", "d", "e"], True), {}, set()
    for now in range(2):
        chosen = choose_examiners(known, asked_at, random.Random(now))
        asked |= set(chosen)
        asked_at |= dict.fromkeys(chosen, float(now))
    assert asked == known.keys()


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


@pytest.mark.parametrize(
    "seen_at",
    [
        "/dns4/evil.example/tcp/1",
        "/ip4/evil.example & run curl x|sh/tcp/1",
        "/ip4/1.2.3/evil",
        "evil",
        "/ip4/9.9.9.9/tcp/1/p2p/evil/p2p-circuit",
    ],
)
def test_an_examiner_cannot_put_what_it_likes_into_the_advice(seen_at: str):
    lie = replace(report("liar", came=False), seen_at=seen_at)
    assert seen_host([lie]) is None
    assert "evil" not in in_words(Reach(Reachability.UNREACHABLE, (lie,)), OWN)


def test_an_operator_who_announces_the_right_address_is_only_told_to_open_the_port():
    seen = replace(report("a", came=False), seen_at="/ip4/93.184.216.34/tcp/55555")
    text = in_words(Reach(Reachability.UNREACHABLE, (seen,)), ("/ip4/93.184.216.34/tcp/4001/p2p/own",))
    assert "open TCP port 4001 in the router, or let" in text
    assert "--announce" not in text


def test_relays_that_were_named_and_do_not_answer_are_what_the_operator_hears_of():
    text = in_words(Reach(Reachability.UNREACHABLE, refused=("9.9.9.9: it does not answer",)), OWN)
    assert text.startswith("no relay carries its streams (9.9.9.9: it does not answer); name other relays")


@pytest.mark.parametrize("kind", list(Reachability))
def test_every_kind_has_its_words(kind: Reachability):
    text = in_words(Reach(kind, (report("a", came=kind is Reachability.DIRECT),), ("relay",)), OWN)
    assert text
    assert ("open TCP port" in text) == (kind is Reachability.UNREACHABLE)
