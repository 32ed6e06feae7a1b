"""What a member announces on a local network comes back from its record, and no other record is one."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import SwarmError
from shoal.joining.invitation import Invitation
from shoal.joining.invite_code import InviteCode, Way
from shoal.joining.lan import MOST_OF_MODEL, MOST_OF_VALUE, Announcement, announcement_of, printable
from shoal.spans import Span

from .lan_in_memory import DIGEST, HOME, OFFICE, announcement, as_heard

INVITATION = Invitation("stories", "llama-12x64-1a2b3c4d", "f" * 32, "bfloat16", "nf4")
PEER = "12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"


@given(
    model=st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=MOST_OF_MODEL)
    | st.just("🐟" * 60),
    ways=st.lists(
        st.builds(Way, st.ip_addresses().map(str), st.integers(1, 65535)), min_size=1, max_size=3, unique=True
    ),
    start=st.integers(0, 4094),
    length=st.integers(1, 4096),
)
def test_an_announcement_comes_back_from_its_record(model: str, ways: list[Way], start: int, length: int) -> None:
    span = Span(start, min(4096, start + length))
    said = Announcement(InviteCode(DIGEST, tuple(ways)), model, "float16", "int8", span, 4096)
    record = as_heard(said)
    assert Announcement.parse(record) == said
    assert all(len(key) + 1 + len(value or b"") <= MOST_OF_VALUE for key, value in record.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"v": "2"},
        {"v": "left out"},
        {"code": "left out"},
        {"code": None},
        {"code": "8H01-NCWB"},
        {"code": "8" * 5000},
        {"code": b"\xff\xfe"},
        {"model": ""},
        {"model": "\x1b\x07\n"},
        {"model": None},
        {"dtype": "float64"},
        {"dtype": "\x1b[31m"},
        {"quantization": "left out"},
        {"blocks": "0:13"},
        {"blocks": "8:4"},
        {"blocks": "0:999999999"},
        {"blocks": "all"},
        {"of": "0"},
        {"of": "-12"},
        {"of": "4097"},
        {"of": "9" * 4000},
        {"of": "twelve"},
    ],
)
def test_what_a_stranger_makes_up_is_refused(changes: dict[str, str | bytes | None]) -> None:
    with pytest.raises(SwarmError, match="an announcement"):
        Announcement.parse(as_heard(announcement(), **changes))


@given(st.dictionaries(st.binary(max_size=20), st.none() | st.binary(max_size=300), max_size=10))
def test_a_record_of_any_bytes_is_refused(record: dict[bytes, bytes | None]) -> None:
    with pytest.raises(SwarmError):
        Announcement.parse(record)


def test_what_else_a_record_has_does_not_matter() -> None:
    assert Announcement.parse({**as_heard(announcement()), b"later": b"1", b"": None}) == announcement()


def test_a_name_is_cut_and_holds_nothing_that_steers_a_terminal() -> None:
    heard = Announcement.parse(as_heard(announcement(), model="a\x1b[2J\u202eb\n" + "c" * 500))
    assert heard.model == "a[2Jb" + "c" * (MOST_OF_MODEL - 6) + "…"
    assert printable("stories") == "stories"


def test_a_member_announces_the_ways_to_it_by_these_networks_only() -> None:
    hosts = ("ip4/192.168.1.5", "ip4/10.0.7.5", "ip4/203.0.113.5", "ip4/127.0.0.1", "ip6/fd00::5")
    addresses = [f"/{host}/tcp/4001/p2p/{PEER}" for host in hosts]
    span = Span(0, 6)

    def codes(*interfaces: str) -> list[str] | None:
        said = announcement_of(INVITATION, addresses, [ipaddress.ip_interface(each) for each in interfaces], span, 12)
        return None if said is None else [way.host for way in said.code.ways]

    assert codes("192.168.1.5/24") == ["192.168.1.5"]
    assert codes("192.168.1.5/24", "10.0.7.5/16") == ["192.168.1.5", "10.0.7.5"]
    assert codes("fd00::5/64") == ["fd00::5"]
    assert codes("192.168.9.9/24") is None
    said = announcement_of(INVITATION, addresses, [HOME, OFFICE], span, 12)
    assert said is not None
    assert (said.code.digest, said.model, said.dtype, said.quantization) == (
        *(INVITATION.digest, "stories", "bfloat16", "nf4"),
    )


def test_a_relayed_address_is_no_way_by_the_local_network() -> None:
    relayed = f"/ip4/192.168.1.5/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}"
    assert announcement_of(INVITATION, [relayed], [HOME], Span(0, 6), 12) is None
