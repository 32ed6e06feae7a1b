"""The error messages of the libp2p daemon, in plain English."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.swarm.known.peer_health import PeerHealth
from shoal.errors import SwarmError
from shoal.net.libp2p.daemon_reasons import OTHER, REASONS, plain_reason
from shoal.net.libp2p.hash_table.dht_directory import P2PDaemonError, translated_errors
from shoal.net.libp2p.libp2p_stream import Libp2pStream
from shoal.net.transport import StreamBroken

PEER = "12D3KooWRm79h2YaX8WVAdg3x2xhztzXFqCMRZD4N5yHmNxRWU1X"
DIAL = f"failed to dial: failed to dial {PEER}: all dials failed\n  * "


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (DIAL + "[/ip4/127.0.0.1/tcp/9] dial tcp4 127.0.0.1:9: connect: connection refused", "nothing listens there"),
        (DIAL + "[/ip4/10.0.0.7/tcp/9] dial tcp4 10.0.0.7:9: i/o timeout", "it does not answer"),
        (DIAL + "[/ip4/10.0.0.7/tcp/9] dial tcp4 10.0.0.7:9: connect: no route to host", "there is no route to it"),
        (DIAL + "[/ip4/127.0.0.1/tcp/9] dial backoff", "dialling it failed a moment ago"),
        (
            DIAL + "[/ip4/127.0.0.1/tcp/9] dial backoff\n  * [/ip4/127.0.0.1/tcp/38425] failed to negotiate security "
            f"protocol: peer id mismatch: expected {PEER}, but remote key matches 12D3KooWLbXUy5g9hnzYe6MKYhJMevP7",
            "another peer has its address",
        ),
        (
            DIAL
            + f"[/ip4/127.0.0.1/tcp/38425/p2p/{PEER}/p2p-circuit] error opening relay circuit: NO_RESERVATION (204)",
            "its relay is not connected to it",
        ),
        ("failed to negotiate protocol: protocols not supported: [/shoal/4]", "it takes no streams of shoal"),
        ("routing: not found", "its address is not known"),
        ("failed to dial: dial to self attempted", "it is this peer"),
        ("context deadline exceeded", "it does not answer"),
        ("goroutine 7 [running]", OTHER),
    ],
)
def test_the_daemons_reasons_are_translated(said, meant):
    assert plain_reason(said).startswith(meant)


@given(st.text())
def test_none_of_the_daemons_own_text_gets_through(said):
    assert plain_reason(said) in {*REASONS.values(), OTHER}


def test_the_daemons_own_message_is_in_the_debug_log(caplog):
    with caplog.at_level(logging.DEBUG, "shoal"):
        plain_reason("dial tcp4 127.0.0.1:9: connect: connection refused")
    assert "dial tcp4 127.0.0.1:9" in caplog.text


def test_the_directorys_errors_are_translated():
    refused = P2PDaemonError(DIAL + "[/ip4/127.0.0.1/tcp/9] connect: connection refused")
    gone = ConnectionRefusedError(111, "Connect call failed ('/tmp/shoal-1/control')")
    for failure, reason in (refused, "nothing listens there"), (gone, "this machine's libp2p daemon does not answer"):
        with pytest.raises(SwarmError) as error, translated_errors():
            raise failure
        assert str(error.value) == f"the directory cannot be reached: {reason}"


@pytest.mark.anyio
@pytest.mark.parametrize(("sent", "where"), [(b"", "the stream from P ended"), (b"\0\0", "P ended in the middle of a")])
async def test_a_stream_that_ends_says_so_without_counting_bytes(sent, where):
    reader = asyncio.StreamReader()
    reader.feed_data(sent)
    reader.feed_eof()
    with pytest.raises(StreamBroken, match=where) as error:
        await Libp2pStream("P", reader, _Writer()).receive()  # type: ignore[arg-type]
    assert "bytes" not in str(error.value)


class _Writer:
    """A writer to which nothing is written."""

    transport = property(lambda self: self)

    def set_write_buffer_limits(self, **_: int) -> None: ...


def test_a_server_that_failed_is_named_once():
    health = PeerHealth(lambda: 0.0)
    health.record_failure(PEER, f"{PEER} cannot be reached: nothing listens there", since=0.0)
    assert health.reasons() == [f"{PEER[-8:]} cannot be reached: nothing listens there"]
