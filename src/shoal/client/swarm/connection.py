"""One stream to one server: what it says, and every way that it can fail, by name.

A server answers a `Ping` at any time, also while it computes. So whoever says nothing is asked, and whoever does not
answer that within about a second is lost; how long an answer may take is another matter.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Self

import torch

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.in_flight import PeerInFlight
from shoal.client.swarm.message_sizes import check_size
from shoal.concurrency import first_of, while_moving
from shoal.errors import Misrouted, PeerError, RequestRejected, ServerBusy, ServerLost
from shoal.net.transport import SLOWEST_LINK, Stream, StreamBroken, Transport
from shoal.net.wire import codec
from shoal.peers import ServerInfo
from shoal.protocol import REPLY_KINDS, AnyMessage, Close, Failure, Leaving, Ping, Pong, ProtocolViolation
from shoal.tensors import Encoding

OPEN_SECONDS = 6.0
MIN_RETRY_SECONDS = 1.0
PING_SECONDS = 0.5
"""After so long a silence the server is asked whether it is there."""
MIN_PING_SECONDS = 0.1
STUCK_SECONDS = 30.0
STUCK_FACTOR = 20
"""A server that says that it works, and computes nothing for so many times what it should take, is stuck.

One that has no room computes nothing either, but after 20 seconds it says that it is busy, which is another matter.
"""

Heard = Callable[[AnyMessage, codec.Tensors], None]


class CannotRewind(PeerError):
    """The server cannot take its session back; it has to be sent everything again."""


class Connection:
    """A stream to one server. What it says is given to `heard`, in order; when it is of no more use, `error` says why.

    `heard` is then called no more, and `ended` once. `in_flight` is what it shares with other streams to the same
    server.
    """

    def __init__(
        self,
        stream: Stream,
        server: ServerInfo,
        config: ClientOptions,
        *,
        in_flight: PeerInFlight | None = None,
        round_trip: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.peer = server.peer
        self.encoding: Encoding = config.wire if config.wire in server.encodings else "raw"
        self.error: PeerError | None = None
        self.heard: Heard = lambda message, tensors: None
        self.ended: Callable[[], None] = lambda: None
        self._stream = stream
        self._config = config
        self._in_flight = in_flight or PeerInFlight()
        self._in_flight.set_bytes(stream, 0)
        self._round_trip = round_trip
        self._sending = asyncio.Lock()
        self._clock = asyncio.get_running_loop().time
        self._usual_seconds: float | None = None  # that what is awaited takes; None while nothing is
        self._patient_since = self._clock()
        self._pinged_at: float | None = None
        self._ping_is_last = False  # nothing was sent or announced behind it: its answer says that all has arrived
        self._worked_at: float | None = None  # since when it works without getting anywhere
        self._num_passes = 0
        self._task = asyncio.create_task(self._live())

    @classmethod
    async def open(
        cls,
        transport: Transport,
        server: ServerInfo,
        config: ClientOptions,
        *,
        in_flight: PeerInFlight | None = None,
        round_trip: Callable[[float], None] = lambda seconds: None,
    ) -> Self:
        """Connect. Raises `ServerLost`."""
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                stream = await transport.open(server.peer, server.addresses)
        except (StreamBroken, TimeoutError) as error:
            why = str(error) or f"{server.peer} did not answer within {OPEN_SECONDS:.0f} s"
            raise ServerLost(why, peer=server.peer) from None
        return cls(stream, server, config, in_flight=in_flight, round_trip=round_trip)

    async def send(self, message: AnyMessage, tensors: codec.Tensors | None = None) -> None:
        """Send a message. Raises `PeerError`s, and `UserError` for tensors that are too large for one."""
        tensors = tensors or {}
        check_size(tensors)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        async with self._sending:  # whoever waits for a turn, waits for us and not for the server
            if self.error is not None:
                raise self.error
            self._ping_is_last = isinstance(message, Ping)
            if self._ping_is_last:
                self._pinged_at = self._clock()
            sending = codec.send(self._stream, message, tensors, self.encoding)
            patience = self._config.silence_seconds + self._in_flight.seconds_for(num_bytes)
            try:
                await while_moving(sending, lambda: self._stream.taken_at, seconds=patience)
            except (StreamBroken, TimeoutError) as failure:
                self.fail(self.lost(failure if str(failure) else "takes nothing more"))
                raise self.error from None  # type: ignore[misc]

    def expect(self, *, usual_seconds: float | None, bytes_in_flight: int) -> None:
        """What is awaited from now on: how long it usually takes, and how much is on its way to the server for it."""
        self._usual_seconds = usual_seconds
        if self.error is None:
            self._in_flight.set_bytes(self._stream, bytes_in_flight)
        self._ping_is_last = False
        self._patient_since = self._clock()

    def fail(self, error: PeerError) -> None:
        """It is of no more use, for this reason."""
        if self.error is None:
            self.error = error
            self._in_flight.discard(self._stream)
            self._task.cancel()
            self.ended()

    async def ask(
        self, message: AnyMessage, tensors: codec.Tensors, *, expect: type[AnyMessage] | UnionType, usual_seconds: float
    ) -> tuple[AnyMessage, codec.Tensors]:
        """Send a question and wait for its answer, which is about as long. Raises `PeerError`s."""
        (answer,) = await self.ask_all([(message, tensors)], expect=expect, usual_seconds=usual_seconds)
        return answer

    async def ask_all(
        self,
        questions: Sequence[tuple[AnyMessage, codec.Tensors]],
        *,
        expect: type[AnyMessage] | UnionType,
        usual_seconds: float,
    ) -> list[tuple[AnyMessage, codec.Tensors]]:
        """Send several questions, one behind the other, and wait for all answers. Raises `PeerError`s."""
        answers: list[tuple[AnyMessage, codec.Tensors]] = []
        record_answer = asyncio.get_running_loop().create_future()

        def heard(reply: AnyMessage, outcome: codec.Tensors) -> None:
            if isinstance(reply, expect) and not record_answer.done():
                answers.append((reply, outcome))
                if len(answers) == len(questions):
                    record_answer.set_result(None)
            elif not isinstance(reply, Pong | Leaving):
                self.fail(self.unasked(reply))

        def ended() -> None:
            if not record_answer.done() and self.error is not None:
                record_answer.set_exception(self.error)

        self.heard, self.ended = heard, ended
        size = sum(tensor.nbytes for _, tensors in questions for tensor in tensors.values())
        self.expect(usual_seconds=usual_seconds, bytes_in_flight=size)
        limit = self._config.longest_answer_seconds + 2 * size / SLOWEST_LINK
        limit += STUCK_FACTOR * usual_seconds  # others may be computed before
        try:
            for message, tensors in questions:
                await self.send(message, tensors)
            ended()
            async with asyncio.timeout(limit):
                await record_answer
        except TimeoutError:
            self.fail(self.lost(f"no answer within {limit:g} s"))
            raise self.error from None  # type: ignore[misc]
        finally:
            record_answer.cancel()
            self.expect(usual_seconds=None, bytes_in_flight=0)
        return answers

    def wrong(self, what: str) -> ServerLost:
        """What to say of a server that answered like that."""
        return ServerLost(f"{self.peer} answered {what}", peer=self.peer)

    def unasked(self, message: AnyMessage) -> ServerLost:
        """What to say of a server that says something that nobody asked for."""
        return self.wrong(f"with {message.kind!r}, which nobody asked for")

    def lost(self, why: object) -> ServerLost:
        """What to say of a server that is gone."""
        return ServerLost(f"{self.peer} is lost: {why}", peer=self.peer)

    # -- while it lasts -----------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        try:
            await first_of(self._read(), self._watch())
        except (StreamBroken, ProtocolViolation) as failure:
            self.fail(self.lost(failure))

    async def _read(self) -> None:
        while self.error is None:
            message, tensors = await codec.receive(self._stream, REPLY_KINDS)
            if isinstance(message, Failure):
                self.fail(self._error(message))
                return
            if isinstance(message, Pong):
                if self._pinged_at is None:
                    self.fail(self.unasked(message))
                    return
                if not self._in_flight.bytes_in_flight:
                    self._round_trip(self._stream.heard_at - self._pinged_at)
                if self._ping_is_last:
                    self._in_flight.set_bytes(self._stream, 0)
                self._pinged_at = None
                self._check_progress(message)
            else:
                self._worked_at = None
            if self.error is None:
                self.heard(message, tensors)

    def _check_progress(self, pong: Pong) -> None:
        now = self._clock()
        if not pong.working or pong.num_passes != self._num_passes or self._worked_at is None:
            self._worked_at, self._num_passes = now, pong.num_passes
        elif now - self._worked_at > STUCK_SECONDS + STUCK_FACTOR * (self._usual_seconds or 0.0):
            self.fail(self.lost(f"it has computed nothing for {now - self._worked_at:.0f} s"))

    async def _watch(self) -> None:
        """Ask whether it is there when it says nothing."""
        while self.error is None:
            now = self._clock()
            if self._pinged_at is not None:
                patience = self._config.silence_seconds + self._in_flight.bytes_in_flight / SLOWEST_LINK
                wait = max(self._pinged_at, self._patient_since, self._in_flight.heard_at) + patience - now
                if wait <= 0:
                    self.fail(self.lost(f"said nothing for {now - self._in_flight.heard_at:.1f} s"))
                    return
            else:
                wait = self._stream.heard_at + self._interval() - now
                if wait <= 0:
                    with contextlib.suppress(PeerError):
                        await self.send(Ping())
                    continue
            await asyncio.sleep(min(wait, self._interval()))  # a pong that has come meanwhile changes what to wait for

    def _interval(self) -> float:
        """What silence makes us ask: that of whom we wait for earlier, the earlier the faster it usually is."""
        if self._usual_seconds is None:
            return PING_SECONDS
        return min(PING_SECONDS, max(MIN_PING_SECONDS, 3 * self._usual_seconds))

    def _error(self, failure: Failure) -> PeerError:
        peer = self.peer
        match failure.code:
            case "busy":
                seconds = max(failure.retry_after or 0.0, MIN_RETRY_SECONDS)
                return ServerBusy(f"{peer} is busy: {failure.reason}", peer=peer, retry_after=seconds)
            case "misrouted":
                return Misrouted(f"{peer} cannot do this: {failure.reason}", peer=peer)
            case "rejected":
                return RequestRejected(f"{peer} rejects this: {failure.reason}", peer=peer)
            case "rewind":
                return CannotRewind(f"{peer} gave up: {failure.reason}", peer=peer)
            case _:
                return ServerLost(f"{peer} gave up: {failure.reason}", peer=peer)

    async def close(self, *, goodbye: bool = True) -> None:
        """Release the stream, telling the server if it may still be listening. May be called twice."""
        self.ended = lambda: None
        goodbye = goodbye and self.error is None
        self.fail(ServerLost(f"the connection to {self.peer} is closed", peer=self.peer))
        if goodbye:
            with contextlib.suppress(StreamBroken, TimeoutError):
                async with asyncio.timeout(1), self._sending:
                    await codec.send(self._stream, Close())
        if self._task is not asyncio.current_task():
            await asyncio.gather(self._task, return_exceptions=True)
        await self._stream.close()


def plausible(result_BTD: torch.Tensor, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> bool:
    """Whether finite inputs gave finite outputs, for the last of them at least. Padding may become anything."""
    if finite(result_BTD) or not finite(hidden_BTD):
        return True
    if mask_BT is None:
        return False
    if mask_BT.shape[1] < result_BTD.shape[1]:  # these tokens are forgotten already
        return True
    return bool(torch.isfinite(result_BTD[mask_BT[:, -result_BTD.shape[1] :].bool()]).all())


def finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity: the fastest way to know, a few microseconds for a token."""
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
