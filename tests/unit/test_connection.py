"""When a server is taken for lost, and when not, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from shoal.client.config import ClientConfig
from shoal.client.connection import PING_SECONDS, STUCK_SECONDS, Connection
from shoal.errors import PeerError, ServerLost
from shoal.net.transport import Buffer, StreamBroken
from shoal.protocol import Leaving, Message, Ping, Pong, Result, dump, parse
from shoal.spans import ServerInfo, ServerState, Span

from . import virtual_time

CONFIG = ClientConfig(silence_seconds=2.0)
SERVER = ServerInfo(
    peer="server",
    span=Span(0, 4),
    state=ServerState.ONLINE,
    fingerprint="f" * 64,
    decode_speed=100.0,
    prefill_speed=100.0,
    cache_tokens_left=4096,
    dtype="float32",
    quantization="none",
    version="1",
    name="",
)


class ScriptedStream:
    """The other side answers each message as it is told, so many seconds later."""

    peer = "server"

    def __init__(self, answer: Callable[[Message], Sequence[Message]], *, delay: float = 0.01) -> None:
        self.sent: list[Message] = []
        self._answer = answer
        self._delay = delay
        self._arriving: asyncio.Queue[Message | None] = asyncio.Queue()

    async def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        message = parse(header)
        self.sent.append(message)
        for answer in self._answer(message):
            asyncio.get_running_loop().call_later(self._delay, self._arriving.put_nowait, answer)

    def say(self, *messages: Message | None) -> None:
        """Of itself; None is the end."""
        for message in messages:
            self._arriving.put_nowait(message)

    async def receive(self) -> tuple[bytes, bytearray]:
        message = await self._arriving.get()
        if message is None:
            raise StreamBroken("the end")
        return dump(message), bytearray()

    async def close(self) -> None:
        self.say(None)


def ended(
    stream: ScriptedStream, *, within: float, usual_seconds: float | None = 0.05
) -> tuple[float, PeerError | None]:
    """When, and why, a connection to somebody who is asked for something ends, in so many seconds."""

    async def live() -> tuple[float, PeerError | None]:
        loop = asyncio.get_running_loop()
        connection = Connection(stream, SERVER, CONFIG)
        over = asyncio.Event()
        connection.ended = over.set
        connection.expect(usual_seconds=usual_seconds, bytes_in_flight=0)
        try:
            async with asyncio.timeout(within):
                await over.wait()
        except TimeoutError:
            assert connection.error is None
        result = loop.time(), connection.error
        await connection.close()
        return result

    return virtual_time.run(live())


def test_a_silent_server_is_lost_when_it_has_not_answered_a_ping_for_long():
    at, error = ended(ScriptedStream(lambda message: []), within=100, usual_seconds=None)
    assert isinstance(error, ServerLost)
    assert "said nothing" in str(error)
    assert at == pytest.approx(PING_SECONDS + CONFIG.silence_seconds, abs=0.01)


def test_a_server_that_is_usually_fast_is_asked_earlier():
    at, error = ended(ScriptedStream(lambda message: []), within=100, usual_seconds=0.05)
    assert isinstance(error, ServerLost)
    assert at == pytest.approx(0.15 + CONFIG.silence_seconds, abs=0.01)


@pytest.mark.parametrize("usual_seconds", [None, 0.001, 0.05, 30.0])
@pytest.mark.parametrize("delay", [0.01, 0.5, 1.9])
def test_a_server_that_answers_pings_is_kept(usual_seconds: float | None, delay: float):
    stream = ScriptedStream(lambda message: [Pong()], delay=delay)
    _, error = ended(stream, within=1000, usual_seconds=usual_seconds)
    assert error is None
    assert sum(isinstance(message, Ping) for message in stream.sent) > 100


def test_a_server_that_works_and_gets_on_is_kept():
    stream = ScriptedStream(lambda message: [Pong(working=True, num_passes=len(stream.sent))])
    assert ended(stream, within=1000)[1] is None


def test_a_server_that_works_and_does_not_get_on_is_stuck():
    at, error = ended(ScriptedStream(lambda message: [Pong(working=True, num_passes=7)]), within=1000)
    assert "has computed nothing" in str(error)
    assert STUCK_SECONDS + 20 * 0.05 < at < STUCK_SECONDS + 20 * 0.05 + 2 * PING_SECONDS


def test_a_server_whose_work_takes_long_is_not_stuck_so_soon():
    stream = ScriptedStream(lambda message: [Pong(working=True, num_passes=7)])
    at, _ = ended(stream, within=1000, usual_seconds=5.0)
    assert at > STUCK_SECONDS + 20 * 5.0


def test_a_server_that_answers_now_and_then_is_not_stuck():
    def answer(message: Message) -> list[Message]:
        return [Pong(working=True, num_passes=7)] + [Result()] * (len(stream.sent) % 20 == 0)

    stream = ScriptedStream(answer)
    assert ended(stream, within=300)[1] is None


@pytest.mark.parametrize("said", [[Pong()], [Result(), Pong()], [Leaving(seconds=1.0), Pong(working=True)]])
def test_a_pong_without_a_ping_ends_it_at_once(said: list[Message]):
    stream = ScriptedStream(lambda message: [])
    stream.say(*said)
    at, error = ended(stream, within=100)
    assert "'pong', which nobody asked for" in str(error)
    assert at < 0.01


def test_the_end_of_the_stream_is_noticed_at_once():
    stream = ScriptedStream(lambda message: [])
    stream.say(None)
    at, error = ended(stream, within=100)
    assert isinstance(error, ServerLost)
    assert at < 0.01
