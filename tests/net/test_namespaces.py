"""The small internet of namespaces: its NATs map and filter as they are named, and nothing of it is left."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shoal.testing.namespaces import Home, Host, Internet, Nat, missing_for_namespaces

PORT = 4001
DROPPED_SECONDS = 0.3
"""Longer than a packet takes here: after it, one that must not come counts as dropped."""
COMES_SECONDS = 5.0
"""How long something may take that must come, on a busy machine."""

pytestmark = pytest.mark.skipif(missing_for_namespaces() is not None, reason=str(missing_for_namespaces()))


@pytest.fixture(scope="module")
def net() -> Iterator[Internet]:
    with Internet() as net:
        yield net


@pytest.fixture(scope="module")
def public(net: Internet) -> list[Host]:
    """Three hosts with public addresses."""
    return [net.host(name) for name in ("one", "two", "three")]


@pytest.fixture(scope="module", params=list(Nat))
def home(net: Internet, request: pytest.FixtureRequest) -> tuple[Nat, Home, Host]:
    """A home behind each kind of NAT, and a host in it."""
    home = net.home(request.param.name, request.param)
    return request.param, home, home.host("inside")


def limit(*, comes: bool) -> float:
    """How long to wait for what must come, or must not."""
    return COMES_SECONDS if comes else DROPPED_SECONDS


def hears(listener: socket.socket, *, expected: bool = True) -> bool:
    """Whether a packet comes, as is `expected` or not."""
    listener.settimeout(limit(comes=expected))
    try:
        listener.recv(100)
    except TimeoutError:
        return False
    return True


def reaches(source: Host, target: Host, *, version: int = 4, expected: bool = True) -> bool:
    """Whether a connection is refused by the target itself, where nothing listens, as is `expected` or not."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with source.open_socket(socket.SOCK_STREAM, family=family) as caller:
        caller.settimeout(limit(comes=expected))
        return caller.connect_ex((target.address, PORT)) == errno.ECONNREFUSED


def test_a_nat_maps_and_filters_datagrams_as_it_is_named(public: list[Host], home: tuple[Nat, Home, Host]) -> None:
    nat, router, host = home
    one, two, three = (each.open_socket(socket.SOCK_DGRAM, port=PORT) for each in public)
    other = public[0].open_socket(socket.SOCK_DGRAM, port=PORT + 1)
    inside = host.open_socket(socket.SOCK_DGRAM, port=PORT)
    with one, two, three, other, inside:
        mapped = []
        for listener, server in zip((one, two), public, strict=False):
            listener.settimeout(COMES_SECONDS)
            inside.sendto(b"hello", (server.address, PORT))
            mapped.append(listener.recvfrom(100)[1])
        assert {address for address, _ in mapped} == {router.address}
        assert (mapped[0] == mapped[1]) is (nat is not Nat.SYMMETRIC)
        one.sendto(b"answer", mapped[0])
        assert hears(inside)
        three.sendto(b"from a third host", mapped[0])
        assert hears(inside, expected=nat is Nat.FULL_CONE) is (nat is Nat.FULL_CONE)
        other.sendto(b"from another port of the first host", mapped[0])
        assert hears(inside, expected=nat is Nat.FULL_CONE) is (nat is Nat.FULL_CONE)


def test_a_third_host_connects_to_a_mapped_port_behind_a_full_cone_only(
    public: list[Host], home: tuple[Nat, Home, Host]
) -> None:
    nat, router, host = home
    server, _, third = public
    port = PORT + 10
    with (
        server.open_socket(socket.SOCK_STREAM, port=port) as listener,
        host.open_socket(socket.SOCK_STREAM, port=port) as outgoing,
        host.open_socket(socket.SOCK_STREAM, port=port) as incoming,
        third.open_socket(socket.SOCK_STREAM) as stranger,
    ):
        listener.listen()
        incoming.listen()
        outgoing.settimeout(COMES_SECONDS)
        outgoing.connect((server.address, port))
        listener.settimeout(COMES_SECONDS)
        accepted, mapped = listener.accept()
        with accepted:
            assert mapped[0] == router.address
            assert (mapped[1] == port) is (nat is not Nat.SYMMETRIC)
            stranger.settimeout(limit(comes=nat is Nat.FULL_CONE))
            connects = stranger.connect_ex(mapped) == 0
            assert connects is (nat is Nat.FULL_CONE)


def test_two_homes_do_not_reach_each_other_by_their_private_addresses(net: Internet) -> None:
    east, west = net.home("east"), net.home("west")
    caller, namesake, target = east.host("caller"), west.host("namesake"), west.host("target")
    assert caller.address == namesake.address
    with target.open_socket(socket.SOCK_STREAM, port=PORT) as listener:
        listener.listen()
        for host, connects in ((namesake, True), (caller, False)):
            with host.open_socket(socket.SOCK_STREAM) as outgoing:
                outgoing.settimeout(limit(comes=connects))
                assert (outgoing.connect_ex((target.address, PORT)) == 0) is connects


def test_sites_can_be_separated_and_cut_off_and_healed(net: Internet) -> None:
    one, two, three = (net.host(name) for name in ("a", "b", "c"))

    assert reaches(one, two)
    net.separate(one, two)
    assert not reaches(one, two, expected=False)
    assert not reaches(two, one, expected=False)
    assert reaches(one, three)
    one.cut()
    assert not reaches(one, three, expected=False)
    one.heal()
    assert reaches(one, three)


def test_hosts_may_have_nothing_but_ipv6() -> None:
    with Internet(versions=(6,)) as net:
        one, two = net.host("one"), net.host("two")
        assert reaches(one, two, version=6)
        assert one.run("ip", "-4", "route").stdout == ""


def test_a_clock_can_be_off(net: Internet) -> None:
    host = net.host("late")
    host.set_clock(-300)
    print_time = "import time; print(time.time())"
    late, right = host.run(sys.executable, "-c", print_time), net.host("right").run(sys.executable, "-c", print_time)
    assert 250 < float(right.stdout) - float(late.stdout) < 350


def test_no_way_leads_to_this_machine_or_beyond(net: Internet) -> None:
    own = [
        each.address
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family == socket.AF_INET
    ]
    hosts = net.home("closed").host("closed"), net.host("outer")
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        for address in own:
            socket.create_connection((address, port), timeout=COMES_SECONDS).close()  # it listens there
            for host in hosts:
                with host.open_socket(socket.SOCK_STREAM) as caller:
                    caller.settimeout(DROPPED_SECONDS)
                    assert caller.connect_ex((address, port)) != 0
    assert "eth0" in hosts[0].run("ip", "route").stdout
    assert hosts[1].run("ip", "-brief", "link").stdout.count("\n") == 2  # loopback, and the cable to the core


MAKES_ONE = """
import signal
from shoal.testing.namespaces import Internet
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
with Internet() as net:
    net.home("home").host("host")
    print("made", flush=True)
    input()
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_after_an_interrupt_or_when_the_next_one_starts(end: signal.Signals) -> None:
    def of(pid: int) -> list[Path]:
        return [*Path("/run/netns").glob(f"shoal-{pid}-*")]

    process = subprocess.Popen([sys.executable, "-c", MAKES_ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline() == b"made\n"
        assert of(process.pid)
        os.kill(process.pid, end)
        process.wait(60)
    if end is signal.SIGKILL:
        with Internet():
            pass
    assert not of(process.pid)
