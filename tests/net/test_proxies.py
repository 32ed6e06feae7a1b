"""Proxies in front of a peer that echoes, with real sockets."""

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
from shoal.testing.proxy_process import ProxyProcess, Traffic
from shoal.testing.proxy_state import HOST, ProxyState

SECONDS = 60.0
"""No step below takes this long; a test that waits for it has failed."""
FOR_EVER = Link(delay_seconds=10 * SECONDS)
DATA = os.urandom(3 << 20)


class Echo:
    """A peer that sends back what it receives, and closes its side when the other side ends."""

    def __init__(self) -> None:
        self._listening = socket.create_server((HOST, 0), reuse_port=True)  # tests dial from its port as well
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
def proxies(echo: Echo, other: Echo) -> Iterator[ProxyProcess]:
    """It ends before the peers do, and so do the connections that they serve."""
    with ProxyProcess() as proxies:
        yield proxies


@pytest.fixture
def proxy(proxies: ProxyProcess, echo: Echo) -> int:
    """The port of a proxy in front of `echo`."""
    return proxies.open_proxy(echo.port, Link(), Link())


@pytest.fixture
def other_proxy(proxies: ProxyProcess, other: Echo) -> int:
    """The port of a proxy in front of `other`."""
    return proxies.open_proxy(other.port, Link(), Link())


@contextlib.contextmanager
def dialled(port: int, *, from_port: int = 0) -> Iterator[socket.socket]:
    with socket.socket() as ours:
        ours.settimeout(SECONDS)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        ours.bind((HOST, from_port))
        ours.connect((HOST, port))
        yield ours


def received(ours: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (more := ours.recv(1 << 16)):
        data += more
    return data


def echoes(ours: socket.socket, data: bytes = b"hello") -> bool:
    """Whether the same data comes back."""
    sender = threading.Thread(target=ours.sendall, args=(data,))
    sender.start()
    answer = received(ours, len(data))
    sender.join()
    return answer == data


def is_silent(ours: socket.socket) -> bool:
    """Whether there is nothing to read: neither data nor an end."""
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
def test_everything_arrives_in_its_order(proxies, echo, link):
    proxy = proxies.open_proxy(echo.port, link, link)
    with dialled(proxy) as one, dialled(proxy) as other:
        for ours in (one, other):
            assert echoes(ours, DATA)
    assert proxies.traffic(echo.port) == Traffic(2, 2 * len(DATA), 2 * len(DATA))


def test_data_over_a_slow_link_arrives_later(proxies, echo, proxy, other_proxy):
    with dialled(proxy) as slow, dialled(other_proxy) as fast:
        assert echoes(slow)
        proxies.set_link(echo.port, FOR_EVER, Link())
        slow.sendall(b"first")
        assert all(echoes(fast) for _ in range(100))
        assert is_silent(slow)


def test_the_two_directions_of_a_link_may_differ(proxies, echo, proxy):
    with dialled(proxy) as ours:
        assert echoes(ours)
        proxies.set_link(echo.port, Link(), FOR_EVER)
        ours.sendall(b"hello")
        while proxies.traffic(echo.port).outward_bytes < 10:  # the peer has received it, and answered
            pass
        assert is_silent(ours)


def test_an_end_is_forwarded_after_the_data_before_it(proxies, echo):
    slow = Link(delay_seconds=0.002, jitter_seconds=0.002, bytes_per_second=50e6)
    with dialled(proxies.open_proxy(echo.port, slow, slow)) as ours:
        sender = threading.Thread(target=lambda: (ours.sendall(DATA), ours.shutdown(socket.SHUT_WR)))
        sender.start()
        assert received(ours, len(DATA) + 1) == DATA
        sender.join()


def test_a_cut_proxy_resets_and_refuses_connections_until_it_is_opened(proxies, echo, proxy):
    with dialled(proxy) as ours:
        assert echoes(ours)
        proxies.set_state(echo.port, ProxyState.CUT)
        with pytest.raises(ConnectionResetError):
            ours.recv(1)
    with pytest.raises(ConnectionRefusedError), dialled(proxy):
        pass
    proxies.set_state(echo.port, ProxyState.OPEN)
    with dialled(proxy) as ours:
        assert echoes(ours)


def test_a_black_hole_loses_nothing_and_reports_nothing(proxies, echo, proxy, other_proxy):
    with dialled(proxy) as before, dialled(other_proxy) as elsewhere:
        assert echoes(before)
        proxies.set_state(echo.port, ProxyState.BLACK_HOLE)
        with dialled(proxy) as during:
            for ours in (before, during):
                ours.sendall(b"hello")
            assert all(echoes(elsewhere) for _ in range(100))
            assert is_silent(before)
            assert is_silent(during)
            proxies.set_state(echo.port, ProxyState.OPEN)
            for ours in (before, during):
                assert received(ours, 5) == b"hello"


def test_a_sender_into_a_black_hole_has_to_stop(proxies, echo, proxy):
    with dialled(proxy) as ours:
        assert echoes(ours)
        proxies.set_state(echo.port, ProxyState.BLACK_HOLE)
        ours.setblocking(False)
        num_sent = 0
        with contextlib.suppress(BlockingIOError):
            while num_sent < 64 << 20:
                num_sent += ours.send(DATA)
        assert num_sent < 64 << 20
        ours.settimeout(SECONDS)
        proxies.set_state(echo.port, ProxyState.OPEN)
        assert len(received(ours, num_sent)) == num_sent


@pytest.mark.parametrize("state", [ProxyState.CUT, ProxyState.BLACK_HOLE])
def test_a_cut_peer_also_loses_the_connections_that_it_dialled(proxies, echo, proxy, other_proxy, state):
    with dialled(other_proxy, from_port=echo.port) as its, dialled(other_proxy) as ours:
        assert echoes(its)
        assert echoes(ours)
        proxies.set_state(echo.port, state)
        if state is ProxyState.CUT:
            with pytest.raises(ConnectionResetError):
                its.recv(1)
        else:
            its.sendall(b"hello")
        assert all(echoes(ours) for _ in range(100))
        assert state is ProxyState.CUT or is_silent(its)
        proxies.set_state(echo.port, ProxyState.OPEN)
        assert state is ProxyState.CUT or received(its, 5) == b"hello"


def test_connections_to_a_peer_that_is_gone_are_reset(proxies, echo, proxy):
    with dialled(proxy) as ours:
        assert echoes(ours)
    echo.close()
    with pytest.raises(ConnectionResetError), dialled(proxy) as ours:
        ours.recv(1)


def test_a_link_that_becomes_fast_is_not_delayed_by_its_slow_past(proxies, echo, proxy):
    with dialled(proxy) as one, dialled(proxy) as other:
        assert echoes(one)
        assert echoes(other)
        proxies.set_link(echo.port, Link(bytes_per_second=1.0), Link())
        one.sendall(b"some words that keep the slow link busy")
        while proxies.traffic(echo.port).inward_bytes < 40:
            pass
        proxies.set_link(echo.port, Link(), Link())
        assert echoes(other)


def test_the_proxies_end_with_the_process_that_started_them():
    script = (
        "import sys; from shoal.testing.proxy_process import ProxyProcess\n"
        "with ProxyProcess(): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
    assert len(children) == 1
    assert not psutil.wait_procs(children, timeout=SECONDS)[1]


def test_a_dead_proxy_process_is_reported(proxies, echo):
    os.kill(proxies.pid, signal.SIGKILL)
    with pytest.raises(SwarmError, match="the proxies ended with status -9"):
        proxies.traffic(echo.port)
