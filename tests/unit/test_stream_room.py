"""Which streams a peer takes: no network, and no peer of it, keeps the others out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.net.addressing.addresses import network_of
from shoal.policy.network.stream_room import (
    IDLE_SECONDS,
    KEPT_STREAMS,
    MAX_SERVED,
    MAX_SERVED_OF_NETWORK,
    MAX_STREAMS,
    MAX_STREAMS_PER_PEER,
    Admitted,
    OpenStream,
    Refused,
    ServedPeers,
    admission,
)

NOW = 1000.0
FOR_STRANGERS = MAX_STREAMS - KEPT_STREAMS


def streams_of(network: str, num_peers: int, each: int, *, used_at: float = NOW, is_served: bool = False) -> list:
    return [
        OpenStream(f"{network}-{peer}", network, used_at, is_served) for peer in range(num_peers) for _ in range(each)
    ]


def stranger(network: str = "new") -> OpenStream:
    return OpenStream(f"{network}-stranger", network, NOW)


def test_sixteen_identities_with_idle_streams_do_not_keep_a_client_out():
    streams = streams_of("attacker", 12, MAX_STREAMS_PER_PEER)
    verdict = admission(streams, stranger(), now=NOW)
    assert isinstance(verdict, Admitted)
    assert streams[verdict.gives_way].network == "attacker"


def test_nor_one_of_their_own_network():
    streams = streams_of("office", 12, MAX_STREAMS_PER_PEER) + streams_of("other", 3, 1)
    assert admission(streams, stranger("office"), now=NOW).gives_way is not None


def test_one_network_may_have_all_that_no_other_wants():
    office: list[OpenStream] = []
    while isinstance(verdict := admission(office, OpenStream(f"p{len(office)}", "office", NOW), now=NOW), Admitted):
        office.append(OpenStream(f"p{len(office)}", "office", NOW))
    assert len(office) == FOR_STRANGERS
    assert verdict == Refused(f"no stream is free, and the peers of office have {FOR_STRANGERS} of them")


def test_a_peer_that_was_served_finds_room_when_strangers_have_filled_theirs():
    strangers = [OpenStream(f"s{index}", f"net {index}", NOW) for index in range(FOR_STRANGERS)]
    assert isinstance(admission(strangers, stranger(), now=NOW), Refused)
    assert admission(strangers, OpenStream("customer", "new", NOW, is_served=True), now=NOW) == Admitted()


def test_a_stream_that_is_idle_gives_way_where_all_are_alike():
    strangers = [OpenStream(f"s{index}", f"net {index}", NOW) for index in range(FOR_STRANGERS)]
    strangers[7] = OpenStream("s7", "net 7", NOW - IDLE_SECONDS)
    strangers[9] = OpenStream("s9", "net 9", NOW - IDLE_SECONDS, is_served=True)
    assert admission(strangers, stranger(), now=NOW) == Admitted(gives_way=7)


def test_one_peer_has_at_most_its_number_even_where_there_is_room():
    streams = streams_of("home", 1, MAX_STREAMS_PER_PEER)
    assert isinstance(admission(streams, OpenStream("home-0", "home", NOW), now=NOW), Refused)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), min_size=200, max_size=400), st.randoms())
def test_no_network_takes_anything_from_one_that_has_less(openings, chance):
    """As many streams are opened as come; the smallest networks only ever grow until they have their share."""
    scale = 3  # of each opening: the limits are far from a few hundred
    streams: list[OpenStream] = []
    for number, (network, peer) in enumerate(openings * scale):
        new = OpenStream(f"{network} {peer}", f"{network}", float(number))
        verdict = admission(streams, new, now=float(number))
        if isinstance(verdict, Refused):
            continue
        if verdict.gives_way is not None:
            before = Counter(each.network for each in streams)
            victim = streams.pop(verdict.gives_way)
            if victim.network != new.network and number - victim.used_at < IDLE_SECONDS:
                assert before[victim.network] > before[new.network] + 1
            assert victim.peer != new.peer or number - victim.used_at >= IDLE_SECONDS
        streams.append(new)
        assert len(streams) <= FOR_STRANGERS
        assert max(Counter(each.peer for each in streams).values()) <= MAX_STREAMS_PER_PEER


def test_the_peers_that_were_served_are_remembered_within_bounds():
    served = ServedPeers()
    for index in range(MAX_SERVED_OF_NETWORK + 1):
        served = served.with_served(f"p{index}", "office")
    assert "p0" not in served
    assert "p1" in served
    served = ServedPeers({f"q{index}": f"net {index}" for index in range(MAX_SERVED)}).with_served("p", "home")
    assert len(served.networks) == MAX_SERVED
    assert "q0" not in served


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("/ip4/8.8.8.8/tcp/31337", "8.8.8.0/24"),
        ("/ip4/8.8.8.9/udp/1/quic-v1", "8.8.8.0/24"),
        ("/ip4/192.168.1.7/tcp/31337", "192.168.1.7"),
        ("/ip4/127.0.0.1/tcp/31337", "127.0.0.1"),
        ("/ip6/2a00:1450:4001:82a::200e/tcp/1", "2a00:1450:4001:82a::/64"),
        ("/ip6/fd00::5/tcp/1", "fd00::/64"),
        ("/ip6/::ffff:8.8.8.8/tcp/1", "8.8.8.0/24"),
        ("/ip4/8.8.8.8/tcp/1/p2p/12D3KooX/p2p-circuit", "the relays in 8.8.8.0/24"),
        (None, "an unknown network"),
        ("/p2p/12D3KooX/p2p-circuit", "/p2p/12D3KooX/p2p-circuit"),
    ],
)
def test_the_network_of_an_address(address: str | None, network: str):
    assert network_of(address) == network
