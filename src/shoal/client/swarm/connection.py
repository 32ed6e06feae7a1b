"""One stream to one server: requests and answers, and every way in which the server can fail, by name.

`shoal.policy.liveness` decides when a silent server is pinged and when it is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Self

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.broken_pairs import AwaitedPush
from shoal.client.swarm.in_flight import PeerInFlight
from shoal.client.swarm.message_sizes import check_size
from shoal.concurrency import first_of, owned_task, with_progress_timeout
from shoal.errors import Interrupted, PeerError, ServerBusy, ServerLost
from shoal.ledgers.tabs import Tab
from shoal.net.transport import SLOWEST_LINK, Stream, StreamBroken, Transport
from shoal.net.wire import codec
from shoal.peers import ServerInfo
from shoal.policy.liveness import STUCK_FACTOR, Liveness
from shoal.protocol import (
    FAILURES,
    REPLY_KINDS,
    Acknowledge,
    AnyMessage,
    Close,
    Failure,
    Leaving,
    Ping,
    Pong,
    ProtocolViolation,
)
from shoal.tensors import PACKED, Encoding

OPEN_SECONDS = 6.0
"""How long a stream may take to open: a second longer than a dial may take (`shoal.net.ping.DIAL_SECONDS`)."""
MIN_RETRY_SECONDS = 1.0
"""A busy server is not asked again before, even if it says that it is: it would be asked in a loop."""
CLOSE_SECONDS = 1.0
"""How long telling a server that the stream is closed may take."""

OnMessage = Callable[[AnyMessage, codec.Tensors], None]


class Connection:
    """A stream to one server, which its owner starts and closes.

    What the server sends is given to `on_message`, in order. When the connection is of no more use, `error` says why;
    `on_message` is not called again then, and `on_end` is called once. `in_flight` is common to all streams to the
    server. `on_round_trip` is given the seconds of each undisturbed ping. What the server computes is put on the `tab`,
    and acknowledged now and then, at the latest with the goodbye; no caller waits for that.
    """

    tab: Tab | None = None

    def __init__(
        self,
        stream: Stream,
        server: ServerInfo,
        config: ClientOptions,
        *,
        in_flight: PeerInFlight | None = None,
        on_round_trip: Callable[[float], None] = lambda seconds: None,
        tab: Tab | None = None,
    ) -> None:
        self.peer = server.peer
        self.encoding: Encoding = config.wire if config.wire in server.encodings else "raw"
        self._packs = config.packs and PACKED in server.encodings
        self.error: PeerError | None = None
        self.on_message: OnMessage = lambda message, tensors: None
        self.on_end: Callable[[], None] = lambda: None
        self.tab = tab
        self._requested_at: float | None = None  # when the requests were sent whole whose answers are awaited
        self._stream = stream
        self._config = config
        self._in_flight = in_flight or PeerInFlight()
        self._in_flight.set_bytes(stream, 0)
        self._on_round_trip = on_round_trip
        self._sending = asyncio.Lock()
        self._clock = asyncio.get_running_loop().time
        self._liveness = Liveness(awaited_since=self._clock())
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        transport: Transport,
        server: ServerInfo,
        config: ClientOptions,
        *,
        in_flight: PeerInFlight | None = None,
        on_round_trip: Callable[[float], None] = lambda seconds: None,
        tab: Tab | None = None,
    ) -> Self:
        """Connect to a server, introduce this client, and start reading and watching; the caller has to close it.

        Raises `ServerLost`.
        """
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                stream = await transport.open(server.peer, server.addresses)
        except (StreamBroken, TimeoutError) as error:
            why = str(error) or f"{server.peer} did not answer within {OPEN_SECONDS:.0f} s"
            raise ServerLost(why, peer=server.peer) from None
        connection = cls(stream, server, config, in_flight=in_flight, on_round_trip=on_round_trip, tab=tab)
        connection.start()
        try:
            if tab is not None and (introduction := await tab.introduction()) is not None:
                await connection.send(introduction)
        except BaseException:
            await connection.close()
            raise
        return connection

    def start(self) -> None:
        """Read from the stream, and watch whether the server is alive, until the connection fails or is closed."""
        self._task = asyncio.create_task(self._live())

    async def send(self, message: AnyMessage, tensors: codec.Tensors | None = None) -> None:
        """Send a message. Raises `PeerError`s, and `UserError` for tensors that are too large for one message.

        If the caller is cancelled meanwhile, nobody knows whether the server has the message: the connection ends.
        """
        try:
            await self._send(message, tensors or {})
        except asyncio.CancelledError:
            if not isinstance(message, Ping | Acknowledge):  # these are cancelled because the connection has ended
                self.fail(Interrupted(f"what was sent to {self.peer} was interrupted", peer=self.peer))
            raise

    async def _send(self, message: AnyMessage, tensors: codec.Tensors) -> None:
        check_size(tensors)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        async with self._sending:  # the patience below is for the server, not for other senders of this client
            if self.error is not None:
                raise self.error
            self._liveness = self._liveness.after_sending(is_ping=isinstance(message, Ping), now=self._clock())
            sending = codec.send(self._stream, message, tensors, self.encoding, packs=self._packs)
            patience = self._config.silence_seconds + self._in_flight.seconds_for(num_bytes)
            try:
                await with_progress_timeout(sending, lambda: self._stream.taken_at, seconds=patience)
            except (StreamBroken, TimeoutError) as failure:
                self.fail(self.lost(failure if str(failure) else "takes nothing more"))
                raise self.error from None  # type: ignore[misc]

    def expect(self, *, usual_seconds: float | None, bytes_in_flight: int) -> None:
        """Say what is awaited from now on: how long it usually takes, and how many bytes travel to the server for it.

        Nothing is awaited if `usual_seconds` is None.
        """
        if self.error is None:
            self._in_flight.set_bytes(self._stream, bytes_in_flight)
        self._liveness = self._liveness.after_request(usual_seconds, now=self._clock())

    def fail(self, error: PeerError) -> None:
        """End the connection: it is of no more use, for this reason. Only the first reason counts."""
        if self.error is None:
            self.error = error
            self._in_flight.discard(self._stream)
            if self._task is not None:
                self._task.cancel()
            self.on_end()

    @property
    def awaiting_since(self) -> float | None:
        """Since when the server owes answers to what it was sent whole; None if it owes none.

        While a large answer arrives, and is not slower than over the slowest link, it is since its last part.
        """
        arriving_until = self._stream.line.arriving_until
        if self._requested_at is None or arriving_until is None:
            return self._requested_at
        return max(self._requested_at, min(self._stream.heard_at, arriving_until))

    async def ask(
        self, message: AnyMessage, tensors: codec.Tensors, *, expect: type[AnyMessage] | UnionType, usual_seconds: float
    ) -> tuple[AnyMessage, codec.Tensors]:
        """Send a request and wait for its answer, of a kind in `expect`, which takes about `usual_seconds`.

        Raises `PeerError`s.
        """
        (answer,) = await self.ask_all([(message, tensors)], expect=expect, usual_seconds=usual_seconds)
        return answer

    async def ask_pushed(
        self,
        message: AnyMessage,
        tensors: codec.Tensors,
        push: AwaitedPush,
        *,
        expect: type[AnyMessage] | UnionType,
        usual_seconds: float,
    ) -> tuple[AnyMessage, codec.Tensors] | None:
        """The same for a request whose inputs another server pushes. None if it does not: close the connection then.

        The answer is awaited from `push.is_due` on. Raises `PeerError`s.
        """
        answers = await self.ask_all([(message, tensors)], expect=expect, usual_seconds=usual_seconds, push=push)
        return answers[0] if answers else None

    async def ask_all(
        self,
        requests: Sequence[tuple[AnyMessage, codec.Tensors]],
        *,
        expect: type[AnyMessage] | UnionType,
        usual_seconds: float,
        push: AwaitedPush | None = None,
    ) -> list[tuple[AnyMessage, codec.Tensors]]:
        """Send several requests, one behind the other, and wait for all answers. Raises `PeerError`s.

        There are no answers if the inputs of the requests should be pushed, and are not.
        """
        answers: list[tuple[AnyMessage, codec.Tensors]] = []
        answered = asyncio.get_running_loop().create_future()

        def on_message(reply: AnyMessage, tensors: codec.Tensors) -> None:
            if isinstance(reply, expect) and not answered.done():
                answers.append((reply, tensors))
                if len(answers) == len(requests):
                    answered.set_result(None)
            elif isinstance(reply, Pong):
                if push is not None and push.is_missing(reply, now=self._clock()) and not answered.done():
                    answered.set_result(None)
            elif not isinstance(reply, Leaving):
                self.fail(self.unasked(reply))

        def on_end() -> None:
            if not answered.done() and self.error is not None:
                answered.set_exception(self.error)

        self.on_message, self.on_end = on_message, on_end
        num_bytes = sum(tensor.nbytes for _, tensors in requests for tensor in tensors.values())
        self.expect(usual_seconds=usual_seconds if push is None else None, bytes_in_flight=num_bytes)
        limit = self._config.longest_answer_seconds + 2 * num_bytes / SLOWEST_LINK
        limit += STUCK_FACTOR * usual_seconds  # the server may compute others' requests first
        try:
            for message, tensors in requests:
                await self.send(message, tensors)
            self._requested_at = self._clock()
            on_end()
            if push is not None:
                async with owned_task(push.is_due.wait()) as pushing:  # another wait has the limit of this one
                    await asyncio.wait({answered, pushing}, return_when=asyncio.FIRST_COMPLETED)
                self.expect(usual_seconds=usual_seconds, bytes_in_flight=0)
                limit += push.num_bytes / SLOWEST_LINK
            async with asyncio.timeout(limit):
                await answered
        except TimeoutError:
            self.fail(self.lost(f"no answer within {limit:g} s"))
            raise self.error from None  # type: ignore[misc]
        finally:
            answered.cancel()
            self._requested_at = None
            self.expect(usual_seconds=None, bytes_in_flight=0)
        return answers

    def wrong(self, what: str) -> ServerLost:
        """The error of a server that answered like that."""
        return ServerLost(f"{self.peer} answered {what}", peer=self.peer)

    def unasked(self, message: AnyMessage) -> ServerLost:
        """The error of a server that sent a message that it was not asked for."""
        return self.wrong(f"with {message.kind!r}, which was not asked for")

    def lost(self, why: object) -> ServerLost:
        """The error of a server that is gone, for this reason."""
        return ServerLost(f"{self.peer} is lost: {why}", peer=self.peer)

    async def close(self, *, goodbye: bool = True) -> None:
        """Release the stream. With `goodbye`, the server is told, unless it failed. May be called twice."""
        self.on_end = lambda: None
        goodbye = goodbye and self.error is None
        self.fail(ServerLost(f"the connection to {self.peer} is closed", peer=self.peer))
        try:
            if goodbye:
                with contextlib.suppress(StreamBroken, TimeoutError):
                    async with asyncio.timeout(CLOSE_SECONDS), self._sending:
                        if self.tab is not None and (last := await self.tab.acknowledgement()) is not None:
                            await codec.send(self._stream, last, packs=self._packs)
                            self.tab.sent()
                        await codec.send(self._stream, Close(), packs=self._packs)
            if self._task is not None and self._task is not asyncio.current_task():
                await asyncio.gather(self._task, return_exceptions=True)
        finally:  # also if the caller is cancelled meanwhile
            await self._stream.close()

    # -- while it is open ---------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        try:
            await first_of(self._read(), self._watch(), *(() if self.tab is None else (self._acknowledge(self.tab),)))
        except (StreamBroken, ProtocolViolation) as failure:
            self.fail(self.lost(failure))

    async def _read(self) -> None:
        """Pass on what the server sends. Pongs are for the watch too; a failure ends the connection."""
        while self.error is None:
            message, tensors = await codec.receive(self._stream, REPLY_KINDS)
            if isinstance(message, Failure):
                self.fail(self._error(message))
            elif isinstance(message, Pong):
                self._take_pong(message)
            else:
                self._liveness = self._liveness.after_message()
            if self.error is None:
                self.on_message(message, tensors)

    def _take_pong(self, pong: Pong) -> None:
        pinged_at, now = self._liveness.pinged_at, self._clock()
        if pinged_at is None:
            self.fail(self.unasked(pong))
            return
        if not self._in_flight.bytes_in_flight:
            self._on_round_trip(self._stream.heard_at - pinged_at)
        if self._liveness.ping_is_last:  # then all that was sent before the ping has arrived
            self._in_flight.set_bytes(self._stream, 0)
        self._liveness = self._liveness.after_pong(working=pong.working, num_passes=pong.num_passes, now=now)
        if (seconds := self._liveness.stuck_seconds(now)) is not None:
            self.fail(self.lost(f"it has computed nothing for {seconds:.0f} s"))

    async def _acknowledge(self, tab: Tab) -> None:
        """Tell the server what it has computed, whenever that is due."""
        while self.error is None:
            await tab.due.wait()
            message = await tab.acknowledgement()
            if message is not None:
                with contextlib.suppress(PeerError):
                    await self.send(message)
                    tab.sent()

    async def _watch(self) -> None:
        """Ping the server when it is silent, and fail when it does not answer."""
        while self.error is None:
            now = self._clock()
            if self._liveness.pinged_at is None:
                wait = self._liveness.ping_due_in(heard_at=self._stream.heard_at, now=now)
                if wait <= 0:
                    with contextlib.suppress(PeerError):
                        await self.send(Ping())
                    continue
            else:
                heard_at = self._in_flight.heard_at
                patience = self._config.silence_seconds + self._in_flight.bytes_in_flight / SLOWEST_LINK
                wait = self._liveness.lost_in(heard_at=heard_at, patience=patience, now=now)
                if wait <= 0:
                    self.fail(self.lost(f"said nothing for {now - heard_at:.1f} s"))
                    return
            await asyncio.sleep(min(wait, self._liveness.ping_interval))  # what comes meanwhile changes the wait

    def _error(self, failure: Failure) -> PeerError:
        error_type, said = FAILURES[failure.code]
        message = f"{self.peer} {said}: {failure.reason}"
        if error_type is ServerBusy:
            seconds = max(failure.retry_after or 0.0, MIN_RETRY_SECONDS)
            return ServerBusy(message, peer=self.peer, retry_after=seconds)
        return error_type(message, peer=self.peer)
