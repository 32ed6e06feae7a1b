from __future__ import annotations

import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.net.addresses import (
    check_announced,
    check_peers,
    listen_address,
    listen_addresses,
    most_useful_first,
    peer_of,
)
from shoal.net.identity import Identity, verify
from shoal.net.own_addresses import free_addresses, lan_interfaces

ALICE, BOB = (Identity(Ed25519PrivateKey.from_private_bytes(bytes(31) + seed)) for seed in (b"a", b"b"))
"""Always the same ones: the names of some tests contain their ids."""


def test_the_peer_id_is_enough_to_check_a_signature() -> None:
    signature = ALICE.sign(b"data")
    assert verify(ALICE.peer, b"data", signature)
    assert not verify(BOB.peer, b"data", signature)
    assert not verify(ALICE.peer, b"other data", signature)
    assert not verify(ALICE.peer, b"data", bytes(64))


@given(st.one_of(st.text(max_size=80), st.text("123ABCabc", min_size=40, max_size=60)), st.binary(max_size=80))
def test_malformed_ids_and_signatures_verify_nothing(peer: str, signature: bytes) -> None:
    assert not verify(peer, b"data", signature)


def test_an_id_has_one_form_only() -> None:
    assert not verify("1" + ALICE.peer, b"data", ALICE.sign(b"data"))
    assert not verify(ALICE.peer + "1", b"data", ALICE.sign(b"data"))


def test_the_peer_id_is_the_one_that_libp2p_derives() -> None:
    # The test vector of libp2p's specification of peer ids.
    key = bytes.fromhex(
        "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
        "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
    )
    identity = Identity.from_bytes(key)
    assert identity.to_bytes() == key
    assert identity.peer == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def test_an_identity_is_created_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity"
    first = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path).peer == first.peer


@pytest.mark.parametrize("content", [b"", b"not a key", ALICE.to_bytes()[:-1], ALICE.to_bytes()[:36] + bytes(32)])
def test_a_file_without_an_identity_is_refused_and_not_changed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an Ed25519 identity"):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        Identity.load_or_create(tmp_path / "file" / "identity")
    assert error.value.hint


@pytest.mark.parametrize(
    "prefix",
    [
        "/ip4/1.2.3.4/tcp/31337",
        "/ip6/::1/tcp/1",
        "/dns4/example.org/tcp/80",
        f"/ip4/1.2.3.4/tcp/1/p2p/{BOB.peer}/p2p-circuit",
    ],
)
def test_an_address_names_its_peer(prefix: str) -> None:
    assert peer_of(f"{prefix}/p2p/{ALICE.peer}") == ALICE.peer


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost:31337",
        "/ip4/1.2.3.4/tcp/31337",
        "/ip4/1.2.3.4/tcp/31337/p2p/",
        "/ip4/1.2.3.4/tcp/31337/p2p/Qmabc",
        f"/ip4/1.2.3.4/tcp/0/p2p/{ALICE.peer}",
        f"/ip4/1.2.3.4/tcp/99999/p2p/{ALICE.peer}",
        f"/ip4/1.2.3/tcp/1/p2p/{ALICE.peer}",
        f"/ip6/1.2.3.4/tcp/1/p2p/{ALICE.peer}",
        f"/ip4/1.2.3.4/udp/1/quic/p2p/{ALICE.peer}",
        f"/dns4/-/tcp/1/p2p/{ALICE.peer}",
        f"/p2p/{ALICE.peer}",
        f"/ip4/1.2.3.4/tcp/1,/p2p/{ALICE.peer}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{ALICE.peer}/p2p-circuit",
    ],
)
def test_an_address_that_cannot_be_dialled_is_refused_with_a_hint(address: str) -> None:
    assert peer_of(address) is None
    with pytest.raises(UserError) as error:
        check_peers([address])
    assert "/ip4/" in (error.value.hint or "")


def test_announced_and_listen_addresses_are_checked_too() -> None:
    assert check_announced(["/dns4/example.org/tcp/31337/"]) == ("/dns4/example.org/tcp/31337",)
    assert listen_address("::", 0) == "/ip6/::/tcp/0"
    for address in "/ip4/1.2.3.4/tcp/0", f"/ip4/1.2.3.4/tcp/1/p2p/{ALICE.peer}", "example.org":
        with pytest.raises(UserError):
            check_announced([address])
    for host, port in ("localhost", 0), ("127.0.0.1", 70000):
        with pytest.raises(UserError):
            listen_address(host, port)


def test_without_a_host_a_peer_listens_with_both_versions_of_ip_on_one_port() -> None:
    assert listen_addresses(None, 31337) == ("/ip4/0.0.0.0/tcp/31337", "/ip6/::/tcp/31337")
    assert listen_addresses("127.0.0.1", 31337) == ("/ip4/127.0.0.1/tcp/31337",)
    addresses = free_addresses(None, 0)
    ports = {address.rpartition("/")[2] for address in addresses}
    assert len(ports) == 1
    assert "0" not in ports
    assert "/ip4/0.0.0.0/tcp/" in addresses[0]


def test_addresses_that_others_can_use_come_first() -> None:
    loopback, docker, home, bridge = (
        f"/ip4/{host}/tcp/1" for host in ("127.0.0.1", "172.17.0.1", "192.168.1.7", "10.8.0.1")
    )
    relayed = f"/ip4/203.0.113.5/tcp/1/p2p/{ALICE.peer}/p2p-circuit"
    given = (loopback, "/ip6/::1/tcp/1", docker, "/ip6/fe80::1/tcp/1", bridge, home, "/ip6/2001:db8::1/tcp/1", relayed)
    found = most_useful_first(given, bridges={"10.8.0.1"})
    assert found == (relayed, home, "/ip6/2001:db8::1/tcp/1", *given[:5])


def test_addresses_in_local_networks_are_those_of_interfaces_that_others_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def has(address: str, netmask: str | None) -> SimpleNamespace:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return SimpleNamespace(family=family, address=address, netmask=netmask)

    shared, quarter, wide = "up,broadcast,running,multicast", "255.255.255.0", "ffff:ffff:ffff:ffff::"
    given = {
        "lo": ("up,loopback,running", [has("127.0.0.1", "255.0.0.0"), has("::1", None)]),
        "wlan0": (shared, [has("fd00::7", wide), has("fe80::7%wlan0", wide), has("192.168.1.7", quarter)]),
        "eth0": (shared, [has("203.0.113.5", quarter), has("2001:db8::5", wide)]),
        "eth1": (shared, [has("169.254.3.4", "255.255.0.0"), has("10.1.2.3", None)]),
        "eth2": ("broadcast,multicast", [has("10.2.0.1", quarter)]),
        "docker0": (shared, [has("172.17.0.1", "255.255.0.0")]),
        "br-1a2b": (shared, [has("172.18.0.1", "255.255.0.0")]),
        "tun0": ("up,pointopoint,running,noarp,multicast", [has("10.8.0.2", quarter)]),
        "wg0": ("up,running,noarp", [has("10.9.0.2", quarter)]),
    }
    stats = {name: SimpleNamespace(flags=flags) for name, (flags, _) in given.items()}
    addresses = {name: each for name, (_, each) in given.items()}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: stats)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"just gone": addresses["wlan0"], **addresses})
    assert [str(each) for each in lan_interfaces()] == ["169.254.3.4/16", "192.168.1.7/24", "fd00::7/64"]
