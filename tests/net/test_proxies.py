"""Doors in front of a peer that echoes, with real sockets."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from shoal.errors import SwarmError
from shoal.testing.link import Link
from shoal.testing.network import Network, Traffic
from shoal.testing.reach import HOST, ProxyCommand

SECONDS = 60.0
"""Nothing below takes that long; a test that waits for it has failed."""
FOR_EVER = Link(delay_seconds=10 * SECONDS)
DATA = os.urandom(3 << 20)


class Echo:
    """A peer that sends back what it hears, and closes when it hears no more."""

    def __init__(self) -> None:
        self._listening = socket.create_server((HOST, 0), reuse_port=True)  # others dial from it
        self.port: int = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                connection.settimeout(SECONDS)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def echo() -> Iterator[Echo]:
    with contextlib.closing(Echo()) as peer:
        yield peer


@pytest.fixture
def other() -> Iterator[Echo]:
    with contextlib.closing(Echo()) as peer:
        yield peer


@pytest.fixture
def network(echo: Echo, other: Echo) -> Iterator[Network]:
    """It ends before the peers do, and so do all connections that they serve."""
    with Network() as network:
        yield network


@pytest.fixture
def proxy(network: Network, echo: Echo) -> int:
    return network.open_door(echo.port, Link(), Link())


@pytest.fixture
def other_door(network: Network, other: Echo) -> int:
    return network.open_door(other.port, Link(), Link())


@contextlib.contextmanager
def dialled(port: int, *, from_port: int = 0) -> Iterator[socket.socket]:
    with socket.socket() as ours:
        ours.settimeout(SECONDS)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        ours.bind((HOST, from_port))
        ours.connect((HOST, port))
        yield ours


def heard(ours: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (more := ours.recv(1 << 16)):
        data += more
    return data


def echoes(ours: socket.socket, data: bytes = b"hello") -> bool:
    """Whether what is said comes back."""
    sender = threading.Thread(target=ours.sendall, args=(data,))
    sender.start()
    answer = heard(ours, len(data))
    sender.join()
    return answer == data


def is_silent(ours: socket.socket) -> bool:
    """Whether there is nothing to hear: no data and no end."""
    return not select.select([ours], [], [], 0)[0]


@pytest.mark.parametrize(
    "link",
    [
        Link(),
        Link(delay_seconds=0.001, jitter_seconds=0.005),
        Link(bytes_per_second=50e6),
        Link(delay_seconds=0.001, jitter_seconds=0.001, bytes_per_second=50e6, queue_seconds=0.001),
    ],
)
def test_everything_arrives_in_its_order(network, echo, link):
    proxy = network.open_door(echo.port, link, link)
    with dialled(proxy) as one, dialled(proxy) as other:
        for ours in (one, other):
            assert echoes(ours, DATA)
    assert network.traffic(echo.port) == Traffic(2, 2 * len(DATA), 2 * len(DATA))


def test_what_has_a_longer_way_arrives_later(network, echo, proxy, other_door):
    with dialled(proxy) as slow, dialled(other_door) as fast:
        assert echoes(slow)
        network.link(echo.port, FOR_EVER, Link())
        slow.sendall(b"first")
        assert all(echoes(fast) for _ in range(100))
        assert is_silent(slow)


def test_the_two_directions_differ(network, echo, proxy):
    with dialled(proxy) as ours:
        assert echoes(ours)
        network.link(echo.port, Link(), FOR_EVER)
        ours.sendall(b"hello")
        while network.traffic(echo.port).outward_bytes < 10:  # it has been heard, and answered
            pass
        assert is_silent(ours)


def test_an_end_is_passed_on_after_what_was_said_before(network, echo):
    slow = Link(delay_seconds=0.002, jitter_seconds=0.002, bytes_per_second=50e6)
    with dialled(network.open_door(echo.port, slow, slow)) as ours:
        sender = threading.Thread(target=lambda: (ours.sendall(DATA), ours.shutdown(socket.SHUT_WR)))
        sender.start()
        assert heard(ours, len(DATA) + 1) == DATA
        sender.join()


def test_who_is_cut_off_is_reset_and_refused_until_the_link_is_healed(network, echo, proxy):
    with dialled(proxy) as ours:
        assert echoes(ours)
        network.set_reach(echo.port, ProxyCommand.CUT)
        with pytest.raises(ConnectionResetError):
            ours.recv(1)
    with pytest.raises(ConnectionRefusedError), dialled(proxy):
        pass
    network.set_reach(echo.port, ProxyCommand.OPEN)
    with dialled(proxy) as ours:
        assert echoes(ours)


def test_a_black_hole_swallows_nothing_and_says_nothing(network, echo, proxy, other_door):
    with dialled(proxy) as before, dialled(other_door) as elsewhere:
        assert echoes(before)
        network.set_reach(echo.port, ProxyCommand.BLACK_HOLE)
        with dialled(proxy) as during:
            for ours in (before, during):
                ours.sendall(b"hello")
            assert all(echoes(elsewhere) for _ in range(100))
            assert is_silent(before)
            assert is_silent(during)
            network.set_reach(echo.port, ProxyCommand.OPEN)
            for ours in (before, during):
                assert heard(ours, 5) == b"hello"


def test_who_sends_into_a_black_hole_has_to_stop(network, echo, proxy):
    with dialled(proxy) as ours:
        assert echoes(ours)
        network.set_reach(echo.port, ProxyCommand.BLACK_HOLE)
        ours.setblocking(False)
        num_sent = 0
        with contextlib.suppress(BlockingIOError):
            while num_sent < 64 << 20:
                num_sent += ours.send(DATA)
        assert num_sent < 64 << 20
        ours.settimeout(SECONDS)
        network.set_reach(echo.port, ProxyCommand.OPEN)
        assert len(heard(ours, num_sent)) == num_sent


@pytest.mark.parametrize("reach", [ProxyCommand.CUT, ProxyCommand.BLACK_HOLE])
def test_a_peer_is_also_cut_off_from_those_that_it_has_dialled(network, echo, proxy, other_door, reach):
    with dialled(other_door, from_port=echo.port) as its, dialled(other_door) as ours:
        assert echoes(its)
        assert echoes(ours)
        network.set_reach(echo.port, reach)
        if reach is ProxyCommand.CUT:
            with pytest.raises(ConnectionResetError):
                its.recv(1)
        else:
            its.sendall(b"hello")
        assert all(echoes(ours) for _ in range(100))
        assert reach is ProxyCommand.CUT or is_silent(its)
        network.set_reach(echo.port, ProxyCommand.OPEN)
        assert reach is ProxyCommand.CUT or heard(its, 5) == b"hello"


def test_a_peer_that_is_gone_resets_who_comes_to_its_door(network, echo, proxy):
    with dialled(proxy) as ours:
        assert echoes(ours)
    echo.close()
    with pytest.raises(ConnectionResetError), dialled(proxy) as ours:
        ours.recv(1)


def test_a_link_that_was_slow_is_not_waited_for_when_it_is_slow_no_more(network, echo, proxy):
    with dialled(proxy) as one, dialled(proxy) as other:
        assert echoes(one)
        assert echoes(other)
        network.link(echo.port, Link(bytes_per_second=1.0), Link())
        one.sendall(b"a word for whose sake the link is busy")
        while network.traffic(echo.port).inward_bytes < 40:
            pass
        network.link(echo.port, Link(), Link())
        assert echoes(other)


def test_the_proxies_end_with_whoever_started_them():
    script = (
        "import sys; from shoal.testing.network import Network\nwith Network(): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        proxies = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
    assert len(proxies) == 1
    assert not psutil.wait_procs(proxies, timeout=SECONDS)[1]


def test_proxies_that_are_gone_are_told_of(network, echo):
    network._process.kill()
    with pytest.raises(SwarmError, match="the proxies ended with status -9"):
        network.traffic(echo.port)
