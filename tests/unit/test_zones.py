"""Which servers may fail together, as their addresses tell."""

from __future__ import annotations

import pytest

from shoal.net.records import Announcement
from shoal.server.measuring.zones import zone_of

PEER = "12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"
RELAYED = f"/ip4/8.8.4.4/tcp/31337/p2p/{PEER}/p2p-circuit/p2p/{PEER}"


def address(host: str) -> str:
    return f"/ip{6 if ':' in host else 4}/{host}/tcp/31337/p2p/{PEER}"


def zone(*hosts: str) -> str:
    return zone_of([address(host) for host in hosts])


def test_a_public_address_tells_the_network_of_its_provider() -> None:
    assert zone("8.8.4.4") == zone("8.8.200.1") == "8.8.0.0/16"
    assert zone("8.9.4.4") != zone("8.8.4.4")
    assert zone("2a01:4f8:c17:1::2") == "2a01:4f8::/32"


def test_a_public_address_counts_more_than_others_in_any_order() -> None:
    assert {
        zone(*hosts) for hosts in (("192.168.1.7", "8.8.4.4"), ("8.8.4.4", "127.0.0.1"), ("8.8.4.4", "2a01::1"))
    } == {"8.8.0.0/16"}


def test_a_local_network_is_told_apart_without_being_named() -> None:
    zones = [zone("192.168.1.7", "127.0.0.1"), zone("127.0.0.1", "192.168.1.200"), zone("192.168.2.7")]
    assert zones[0] == zones[1] != zones[2]
    assert not any("192" in each or "168" in each.partition("-")[0] for each in zones)
    assert zone("127.0.0.1") == zone("127.0.0.1") != zones[0]


def test_the_network_of_containers_tells_nothing() -> None:
    assert zone("172.17.0.1", "192.168.1.7") == zone("192.168.1.7")
    assert zone("172.17.0.1") == ""


def test_behind_relays_the_zone_is_unknown_because_many_homes_have_the_same_local_network() -> None:
    assert zone_of([RELAYED]) == ""
    assert zone_of([address("192.168.1.7"), RELAYED]) == ""
    assert zone_of([address("8.8.4.4"), RELAYED]) == "8.8.0.0/16"


@pytest.mark.parametrize(
    "other", ["/memory/s0", "/dns4/example.org/tcp/1", "", "/", "nonsense", "/ip4/999.1.1.1/tcp/1"]
)
def test_other_addresses_tell_nothing(other: str) -> None:
    assert zone_of([other]) == zone_of([]) == ""


@pytest.mark.parametrize(
    "host", ["255.255.255.255", "8.8.4.4", "10.0.0.1", "ffff:ffff:ffff:ffff::1", "2a01:4f8::1", "fe80::1"]
)
def test_every_zone_fits_into_a_record(host: str) -> None:
    limits = [each.max_length for each in Announcement.model_fields["zone"].metadata if hasattr(each, "max_length")]
    assert len(zone(host)) <= min(limits)
