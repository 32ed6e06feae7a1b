"""When a connection takes its server for lost, and when not, in virtual time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import torch

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.connection import Connection
from shoal.client.swarm.in_flight import PeerInFlight
from shoal.errors import Interrupted, PeerError, ServerLost
from shoal.net.lines import Line
from shoal.net.transport import CHUNK_BYTES, SLOWEST_LINK, Buffer, HeaderCheck, StreamBroken
from shoal.net.wire.frames import payload_bytes
from shoal.peers import ServerInfo, ServerState
from shoal.policy.liveness import PING_SECONDS, STUCK_SECONDS
from shoal.protocol import AnyMessage, Leaving, Ping, Pong, Step, StepResult, dump, parse
from shoal.spans import Span

from . import virtual_time

CONFIG = ClientOptions(silence_seconds=2.0)
MEGABYTE = 2**20
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
    """The other side answers each message as it is told, `delay` seconds later."""

    peer = "server"
    line = Line()

    def __init__(
        self,
        answer: Callable[[AnyMessage], Sequence[AnyMessage]],
        *,
        delay: float = 0.01,
        bytes_per_second: float = math.inf,
    ) -> None:
        self.sent: list[AnyMessage] = []
        self.heard_at = self.taken_at = 0.0
        self._answer = answer
        self._delay = delay
        self._bytes_per_second = bytes_per_second
        self._arriving: asyncio.Queue[AnyMessage | None] = asyncio.Queue()

    async def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        message = parse(header)
        for start in range(0, payload_bytes(payload), CHUNK_BYTES):
            part = min(CHUNK_BYTES, payload_bytes(payload) - start)
            await asyncio.sleep(part / self._bytes_per_second)
            self.taken_at = asyncio.get_running_loop().time()
        self.sent.append(message)
        for answer in self._answer(message):
            asyncio.get_running_loop().call_later(self._delay, self._arriving.put_nowait, answer)

    def say(self, *messages: AnyMessage | None) -> None:
        """Send these without being asked; None is the end of the stream."""
        for message in messages:
            self._arriving.put_nowait(message)

    async def receive(self, check_header: HeaderCheck | None = None) -> tuple[bytes, bytearray]:
        message = await self._arriving.get()
        if message is None:
            raise StreamBroken("the end")
        self.heard_at = asyncio.get_running_loop().time()
        if check_header is not None:
            check_header(dump(message), 0)
        return dump(message), bytearray()

    async def close(self) -> None:
        self.say(None)


def ended(
    stream: ScriptedStream,
    *,
    within: float,
    usual_seconds: float | None = 0.05,
    bytes_in_flight: int = 0,
    in_flight: PeerInFlight | None = None,
    meanwhile: Callable[[Connection], Coroutine[Any, Any, None]] | None = None,
) -> tuple[float, PeerError | None]:
    """When and why a connection that awaits an answer ends, at most `within` seconds from now."""

    async def live() -> tuple[float, PeerError | None]:
        loop = asyncio.get_running_loop()
        connection = Connection(stream, SERVER, CONFIG, in_flight=in_flight)
        over = asyncio.Event()
        connection.on_end = over.set
        connection.start()
        connection.expect(usual_seconds=usual_seconds, bytes_in_flight=bytes_in_flight)
        other = None if meanwhile is None else asyncio.create_task(meanwhile(connection))
        try:
            async with asyncio.timeout(within):
                await over.wait()
        except TimeoutError:
            assert connection.error is None
        result = loop.time(), connection.error
        await connection.close()
        if other is not None:
            await other
        return result

    return virtual_time.run(live())


def test_a_silent_server_is_lost_when_it_has_not_answered_a_ping_for_long():
    at, error = ended(ScriptedStream(lambda message: []), within=100, usual_seconds=None)
    assert isinstance(error, ServerLost)
    assert "said nothing" in str(error)
    assert at == pytest.approx(PING_SECONDS + CONFIG.silence_seconds, abs=0.01)


def test_a_server_that_is_usually_fast_is_pinged_earlier():
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


def test_a_server_that_works_and_computes_passes_is_kept():
    stream = ScriptedStream(lambda message: [Pong(working=True, num_passes=len(stream.sent))])
    assert ended(stream, within=1000)[1] is None


def test_a_server_that_works_and_computes_no_pass_is_stuck():
    at, error = ended(ScriptedStream(lambda message: [Pong(working=True, num_passes=7)]), within=1000)
    assert "has computed nothing" in str(error)
    assert STUCK_SECONDS + 20 * 0.05 < at < STUCK_SECONDS + 20 * 0.05 + 2 * PING_SECONDS


def test_a_server_whose_work_takes_long_is_not_stuck_so_soon():
    stream = ScriptedStream(lambda message: [Pong(working=True, num_passes=7)])
    at, _ = ended(stream, within=1000, usual_seconds=5.0)
    assert at > STUCK_SECONDS + 20 * 5.0


def test_a_server_that_answers_now_and_then_is_not_stuck():
    def answer(message: AnyMessage) -> list[AnyMessage]:
        return [Pong(working=True, num_passes=7)] + [StepResult()] * (len(stream.sent) % 20 == 0)

    stream = ScriptedStream(answer)
    assert ended(stream, within=300)[1] is None


@pytest.mark.parametrize("said", [[Pong()], [StepResult(), Pong()], [Leaving(seconds=1.0), Pong(working=True)]])
def test_a_pong_without_a_ping_ends_it_at_once(said: list[AnyMessage]):
    stream = ScriptedStream(lambda message: [])
    stream.say(*said)
    at, error = ended(stream, within=100)
    assert "'pong', which was not asked for" in str(error)
    assert at < 0.01


def test_a_server_that_is_being_sent_something_large_is_kept():
    stream = ScriptedStream(lambda message: [Pong()] * isinstance(message, Ping), bytes_per_second=MEGABYTE)

    async def send(connection: Connection) -> None:
        await connection.send(Step(epoch=0, position=0), {"hidden": torch.zeros(10 * MEGABYTE, dtype=torch.uint8)})
        assert not any(isinstance(message, Ping) for message in stream.sent)

    assert ended(stream, within=100, meanwhile=send)[1] is None
    assert isinstance(stream.sent[1], Ping)


def test_a_server_that_takes_nothing_is_lost():
    stream = ScriptedStream(lambda message: [Pong()], bytes_per_second=1.0)

    async def send(connection: Connection) -> None:
        with pytest.raises(ServerLost, match="takes nothing more"):
            await connection.send(Step(epoch=0, position=0), {"hidden": torch.zeros(MEGABYTE, dtype=torch.uint8)})

    at, error = ended(stream, within=100, meanwhile=send)
    assert at == pytest.approx(CONFIG.silence_seconds + CHUNK_BYTES / SLOWEST_LINK)
    assert isinstance(error, ServerLost)


def test_a_server_that_was_sent_something_large_may_answer_later():
    at, _ = ended(ScriptedStream(lambda message: []), within=1000, bytes_in_flight=10 * MEGABYTE)
    assert at == pytest.approx(0.15 + CONFIG.silence_seconds + 10 * MEGABYTE / SLOWEST_LINK, abs=0.01)


def test_an_answered_ping_says_that_all_before_it_has_arrived():
    stream = ScriptedStream(lambda message: [Pong()] * (len(stream.sent) == 1))
    at, _ = ended(stream, within=1000, bytes_in_flight=10 * MEGABYTE)
    assert at == pytest.approx(0.15 + 0.01 + 0.15 + CONFIG.silence_seconds, abs=0.01)


def test_a_server_whose_answer_is_arriving_is_kept():
    stream = ScriptedStream(lambda message: [])

    async def trickle(connection: Connection) -> None:
        for _ in range(60):
            stream.heard_at = asyncio.get_running_loop().time()
            await asyncio.sleep(1.0)

    at, error = ended(stream, within=1000, meanwhile=trickle)
    assert "said nothing for 2." in str(error)
    assert at == pytest.approx(59 + CONFIG.silence_seconds, abs=0.01)


def test_bytes_in_flight_on_one_stream_delay_the_others():
    in_flight, busy = PeerInFlight(), ScriptedStream(lambda message: [])
    in_flight.set_bytes(busy, 10 * MEGABYTE)
    at, _ = ended(ScriptedStream(lambda message: []), within=1000, in_flight=in_flight)
    assert at == pytest.approx(0.15 + CONFIG.silence_seconds + 10 * MEGABYTE / SLOWEST_LINK, abs=0.01)


def test_a_message_on_one_stream_shows_that_the_server_is_alive():
    in_flight, busy = PeerInFlight(), ScriptedStream(lambda message: [])
    in_flight.set_bytes(busy, 0)
    busy.heard_at = 50.0
    at, _ = ended(ScriptedStream(lambda message: []), within=1000, in_flight=in_flight)
    assert at == pytest.approx(50.0 + CONFIG.silence_seconds, abs=0.01)


def test_a_stream_that_has_ended_delays_no_other():
    in_flight = PeerInFlight()
    for _ in range(2):
        ended(ScriptedStream(lambda message: []), within=1000, in_flight=in_flight, bytes_in_flight=MEGABYTE)
    assert in_flight.bytes_in_flight == 0


def test_the_end_of_the_stream_is_noticed_at_once():
    stream = ScriptedStream(lambda message: [])
    stream.say(None)
    at, error = ended(stream, within=100)
    assert isinstance(error, ServerLost)
    assert at < 0.01


def test_a_message_that_is_interrupted_ends_the_connection_and_is_nobodys_fault():
    """The server may have half of it. Messages behind it are told so, and not that the server is lost."""
    stream = ScriptedStream(lambda message: (), bytes_per_second=MEGABYTE)

    async def meanwhile(connection: Connection) -> None:
        sending = asyncio.create_task(connection.send(Step(epoch=0, position=0), {"hidden": torch.zeros(MEGABYTE)}))
        behind = asyncio.create_task(connection.send(Step(epoch=0, position=1)))
        await asyncio.sleep(1.0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(Interrupted):
            await behind

    at, error = ended(stream, within=10.0, meanwhile=meanwhile)
    assert (at, type(error)) == (pytest.approx(1.0), Interrupted)
    assert stream.sent == []


def test_an_answer_is_awaited_from_when_the_request_was_sent_whole_and_while_it_comes_from_its_last_part():
    stream = ScriptedStream(lambda message: [Pong(working=True)] * isinstance(message, Ping), bytes_per_second=MEGABYTE)
    stream.line = Line()
    request = Step(epoch=0, position=0), {"hidden": torch.zeros(2 * MEGABYTE, dtype=torch.uint8)}

    async def act() -> list[float | None]:
        connection = Connection(stream, SERVER, CONFIG)
        connection.start()
        asking = asyncio.create_task(connection.ask(*request, expect=StepResult, usual_seconds=0.1))
        await asyncio.sleep(1.0)
        seen = [connection.awaiting_since]
        await asyncio.sleep(2.0)
        seen.append(connection.awaiting_since)
        stream.line.arriving_until, stream.heard_at = 4.0, 2.9
        seen.append(connection.awaiting_since)
        stream.heard_at = 4.5  # too slowly
        seen.append(connection.awaiting_since)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        seen.append(connection.awaiting_since)
        await connection.close()
        return seen

    assert virtual_time.run(act()) == [None, pytest.approx(2.0), 2.9, 4.0, None]


def test_a_connection_whose_opening_is_interrupted_is_closed():
    """Nobody has it then, to close it: it would ping the server for ever."""
    stream = ScriptedStream(lambda message: ())

    class Slow:
        due = asyncio.Event()

        async def introduction(self) -> None:
            await asyncio.Event().wait()

        async def acknowledgement(self) -> None:
            return None

    class Dialled:
        async def open(self, peer: str, addresses: Sequence[str]) -> ScriptedStream:
            return stream

    async def act() -> set[asyncio.Task[Any]]:
        before = asyncio.all_tasks()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3.0):
                await Connection.open(Dialled(), SERVER, CONFIG, tab=Slow())  # type: ignore[arg-type]
        num_sent = len(stream.sent)
        await asyncio.sleep(60.0)
        assert len(stream.sent) == num_sent
        return asyncio.all_tasks() - before

    assert not virtual_time.run(act())
