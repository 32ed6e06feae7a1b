"""Which records of the directory give way to which, and what an answer shows."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shoal.net.addressing.origins import origin_of
from shoal.policy.network.table_room import UNKNOWN, Held, Origin, fair_order, gives_way, shown

SIZE = Held(0, "", None, bytes(500), 0.0, 0.0).size


def held(owner: str, address: str | None, *, since: float = 0.0, num_bytes: int = 500) -> Held:
    """A record of 500 bytes from this IPv4 address; this peer's own if there is none."""
    origin = None if address is None else origin_of(f"/ip4/{address}/tcp/1")
    return Held(0, owner, origin, bytes(num_bytes), since, 1e9)


def owners(records: list[Held]) -> str:
    return "".join(each.owner for each in records)


def test_the_network_of_a_peer_is_that_of_its_connection_or_of_its_relay() -> None:
    relay = "/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo/p2p-circuit"
    assert origin_of("/ip4/8.8.4.5/tcp/31337") == Origin("8.8.4.0/24", "8.8.0.0/16")
    assert origin_of("/ip4/10.0.0.5/tcp/31337") == Origin("10.0.0.5", "10.0.0.0/16")
    assert origin_of("/ip6/2001:db8:1:2:3::4/tcp/1") == Origin("2001:db8:1:2::/64", "2001:db8:1::/48")
    assert origin_of(f"/ip4/8.8.4.5/tcp/1{relay}") == Origin("the relays in 8.8.4.0/24", "8.8.0.0/16/p2p-circuit")
    for unclear in None, "", "/dns4/example.org/tcp/1", "/ip4/nonsense/tcp/1", "/p2p-circuit":
        assert origin_of(unclear) == UNKNOWN


def test_the_first_record_of_each_network_comes_before_the_second_of_any() -> None:
    records = [held("a", "8.8.0.1"), held("b", "8.8.0.2"), held("c", "8.8.0.3"), held("d", "8.8.1.1")]
    assert owners(fair_order(records)) == "adbc"
    assert owners(fair_order([*records, held("o", None)])) == "oadbc"


def test_of_two_networks_with_one_record_that_in_the_emptier_wide_network_comes_first() -> None:
    """Someone who has a /48 of IPv6 has 65,536 networks of the size that a customer has."""
    many = [Held(0, "m", origin_of(f"/ip6/2001:db8:1:{number:x}::1/tcp/1"), b"", 0.0, 0.0) for number in range(100)]
    one = Held(0, "o", origin_of("/ip6/2001:db8:2::1/tcp/1"), b"", 0.0, 0.0)
    assert owners(fair_order([*many, one]))[:2] == "mo"


def test_records_that_came_last_from_the_network_with_most_give_way() -> None:
    crowd = [held("x", "192.0.2.1", since=100.0 + number) for number in range(20)]
    others = [held("o", None, since=900.0), held("h", "198.51.100.1", since=901.0)]
    removed = gives_way([*others, *crowd], most_bytes=16 * SIZE)
    assert [each.since for each in sorted(removed, key=lambda each: each.since)] == [113.0 + n for n in range(7)]
    assert not gives_way([*others, *crowd], most_bytes=22 * SIZE)


def test_own_records_do_not_give_way_even_where_they_alone_are_too_many() -> None:
    own = [held("o", None) for _ in range(5)]
    assert owners(gives_way([*own, held("x", "192.0.2.1")], most_bytes=2 * SIZE)) == "x"


networks = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 1000)), max_size=60)


@given(networks, st.integers(0, 60))
def test_no_network_loses_a_record_while_another_keeps_two_more(given: list[tuple[int, int, int]], room: int) -> None:
    records = [
        held(f"{number}", f"8.{wide}.{narrow}.1", since=since) for number, (wide, narrow, since) in enumerate(given)
    ]
    removed = gives_way(records, most_bytes=room * SIZE)
    left = [each for each in records if each not in removed]
    assert len(left) <= room
    if not removed:
        return
    assert len(left) >= room - room // 16 - 1
    number = Counter(each.origin for each in left)
    for lost in removed:
        assert max(number.values(), default=0) <= number[lost.origin] + 1
        assert all(each.since <= lost.since for each in left if each.origin == lost.origin)


def test_an_answer_shows_networks_alike_and_in_time_every_record() -> None:
    crowd = [held(f"x{number}", "192.0.2.1") for number in range(300)]
    honest = [held(f"h{number}", f"198.51.{number}.1") for number in range(10)]
    seen = Counter[str]()
    rng = random.Random(1)
    for _ in range(50):
        records = [*crowd, *honest]
        rng.shuffle(records)
        chosen = shown(records, most_bytes=60 * 628, overhead=128)
        assert len(chosen) == 60
        seen.update(each.owner for each in chosen)
    assert {seen[each.owner] for each in honest} == {50}
    assert all(seen[each.owner] for each in crowd)
