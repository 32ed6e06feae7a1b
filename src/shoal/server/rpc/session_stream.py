"""One client's session: steps of the client and the upstream server, computed in order, answered and pushed on."""

from __future__ import annotations

import asyncio
import logging

from shoal.concurrency import first_of
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.protocol import (
    MAX_STEP_TOKENS,
    SESSION_KINDS,
    Acknowledge,
    AnyMessage,
    Close,
    Downstream,
    Leaving,
    Open,
    Opened,
    Ping,
    Pong,
    Rewind,
    SetNeighbors,
    Step,
    StepResult,
    Unreached,
    Upstream,
)
from shoal.server.engine.engine import Engine
from shoal.server.refusals import Refused, rejected
from shoal.server.rpc.ping_pace import PingPace, payer_behind
from shoal.server.rpc.pushing.push_connection import Pushed
from shoal.server.rpc.pushing.push_service import PushService
from shoal.server.rpc.receipt_writer import ReceiptWriter
from shoal.server.rpc.ring_place import RingPlace
from shoal.server.rpc.step_queue import ReceivedStep, StepQueue
from shoal.server.rpc.stream_account import StreamAccount
from shoal.tensors import Encoding

log = logging.getLogger(__name__)

MAX_PENDING_RESULTS = 16
"""Results that wait for a slow client or a slow downstream server: at this number the session stops computing."""
MAX_PENDING_TOKENS = 4 * MAX_STEP_TOKENS
"""The same, as the tokens of all these results, if they were all as large as the next one."""
MAX_REPLAYED_RESULT_BYTES = 1 << 20
"""The last answer is kept if it is not larger, in case the client asks again; a larger one is computed again."""


def may_wait(num_waiting: int, size: int) -> bool:
    """Whether the result of a step of `size` tokens may wait beside the others."""
    return num_waiting < MAX_PENDING_RESULTS and num_waiting * size < MAX_PENDING_TOKENS


class SessionStream:
    """A session, as long as its client's stream lasts. Four tasks receive, compute, answer and sign."""

    def __init__(
        self,
        stream: Stream,
        engine: Engine,
        push_service: PushService,
        *,
        account: StreamAccount,
        ping_pace: PingPace,
        idle_seconds: float,
    ) -> None:
        self._stream = stream
        self._engine = engine
        self._account = account
        self._ping_pace = ping_pace
        self._idle_seconds = idle_seconds
        self._transport = push_service.transport
        self._ring = RingPlace(push_service, self._pushed)
        self._computing: Step | None = None
        self._answered: tuple[StepResult, codec.Tensors, Encoding] | None = None  # the last, unless it is large
        self._news = asyncio.Event()
        self._finished = asyncio.Event()
        self._sending = asyncio.Lock()
        self._answers: asyncio.Queue[tuple[AnyMessage, codec.Tensors, Encoding]] = asyncio.Queue()
        self._refused: Refused | None = None

    async def run(self, request: Open, tensors: codec.Tensors) -> None:
        """Serve the session until the client closes it.

        Raises `MissingFromCache` at the start, and later `Refused`, `StreamBroken`, `ProtocolViolation` and
        `TimeoutError`, which end the session.
        """
        self._session, known = self._engine.open(self._stream.peer, request, tensors, payer=payer_behind(self._stream))
        self._queue = StepQueue(request.epoch, self._session.num_tokens)
        self._receipts = ReceiptWriter(
            self._transport,
            client=self._stream.peer,
            session=request.receipts,
            send=lambda receipt: self._answers.put_nowait((receipt, {}, "raw")),
            changed=self._news.set,
        )
        try:
            self._set_neighbors(request.upstream, request.downstream)
            known = None if known is None or request.skip >= known.shape[1] else known[:, request.skip :]
            outputs: codec.Tensors = {} if known is None else {"hidden": known}
            await self._send(Opened(num_tokens=self._session.num_tokens), outputs, request.encoding)
            await first_of(self._receive_messages(), self._compute(), self._answer(), self._receipts.run())
        finally:
            self._set_neighbors(None, None)
            self._engine.close(self._session)
            # The ring and the receipts call this object, so it stays until the garbage collector looks for circles.
            # What it holds of steps does not.
            self._queue, self._answers, self._answered = StepQueue(request.epoch, 0), asyncio.Queue(), None

    def leave(self, seconds: float) -> None:
        """Tell the client, behind the answers that it is still sent, that the server goes away in `seconds`."""
        self._answers.put_nowait((Leaving(seconds=seconds), {}, "raw"))

    # -- receiving ----------------------------------------------------------------------------------------------------

    async def _receive_messages(self) -> None:
        while True:
            async with asyncio.timeout(self._idle_seconds):
                message, tensors = await codec.receive(
                    self._stream, SESSION_KINDS, self._engine.validator.check_declared
                )
            if not isinstance(message, Step):
                await self._ping_pace.turn(payer_behind(self._stream))
            match message:
                case Step():
                    self._accept(message, tensors)
                case Rewind():
                    self._queue.rewind(message)
                    self._news.set()
                case Ping():
                    await self._send(self._pong())
                case SetNeighbors():
                    self._set_neighbors(message.upstream, message.downstream)
                case Acknowledge():
                    await self._account.acknowledged(message)
                case Close():
                    self._ring.ignore_upstream()
                    await first_of(self._finish(), self._until_gone())
                    return
                case _:
                    raise rejected(f"a message of kind {message.kind!r} makes no sense here")

    async def _finish(self) -> None:
        """Wait until all that was asked is answered."""
        await self._finished.wait()
        await self._answers.join()

    async def _until_gone(self) -> None:
        """Raises `StreamBroken` when the client stops waiting for the answers."""
        await codec.receive(self._stream, frozenset())

    def _pushed(self, message: Pushed, tensors: codec.Tensors) -> None:
        """The upstream server has pushed something over the session's link: a step, if it is honest."""
        if isinstance(message, Step):
            self._accept(message, tensors, link=message.link)

    def _accept(self, step: Step, tensors: codec.Tensors, *, link: str | None = None) -> None:
        """Validate and queue a step. A pushed one that is wrong is dropped: that is not the client's fault."""
        try:
            received = ReceivedStep(step, self._engine.validator.step_inputs(tensors), link=link)
            is_last = self._queue.add(received)
        except Refused as refused:
            if link is not None:
                log.debug("a pushed step is refused: %s", refused.failure.reason)
                return
            self._refused = refused
        else:
            if is_last and link is None and self._computing is None:
                self._repeat(received)
        self._finished.clear()
        self._news.set()

    def _repeat(self, received: ReceivedStep) -> None:
        """The client sends the last step again: its answer was lost, or the step did not reach the next server.

        A step that is pushed again is ignored: in a ring that is linked into a loop, it would go round for long.
        """
        hops_left = received.step.hops_left
        if self._answered is None or (hops_left and "hidden" not in self._answered[1]):
            self._queue.again(received)
        elif self._has_room_for(received):
            _, answer, encoding = self._answered
            if hops_left:
                self._push(received, answer, encoding)
            self._answers.put_nowait(self._answered)

    def _has_room_for(self, received: ReceivedStep) -> bool:
        """Whether the result of a step may wait beside others."""
        num_waiting = max(self._answers.qsize(), self._ring.num_waiting, self._receipts.num_waiting)
        return may_wait(num_waiting, received.size)

    def _set_neighbors(self, upstream: Upstream | None, downstream: Downstream | None) -> None:
        """Change the session's place in the ring."""
        if self._ring.upstream is not None and self._ring.upstream != upstream:
            self._queue.forget(self._ring.upstream.link)
        self._ring.change(upstream, downstream)
        self._news.set()

    def _pong(self) -> Pong:
        computing = self._computing
        return Pong(
            working=computing is not None or self._queue.is_ready or not self._answers.empty(),
            num_passes=self._engine.num_passes,
            epoch=self._queue.epoch if computing is None else computing.epoch,
            position=self._queue.position if computing is None else computing.position,
        )

    # -- computing ----------------------------------------------------------------------------------------------------

    async def _compute(self) -> None:
        while True:
            while (following := self._queue.following) is not None and self._has_room_for(following):
                await self._compute_step(self._queue.take())
            if self._refused is not None:
                raise self._refused
            if not self._queue.is_ready:
                self._finished.set()
            self._news.clear()
            await self._news.wait()

    async def _compute_step(self, received: ReceivedStep) -> None:
        step = received.step
        goes_on = step.hops_left > 0
        request = step.model_copy(update={"logits": None, "top_k": None}) if goes_on else step
        self._computing, self._answered = step, None
        began = asyncio.get_running_loop().time()
        try:
            answer = await self._engine.step(self._session, request, received.inputs, rows=received.rows)
        except Refused as refused:
            if received.link is None or not refused.is_request_at_fault:
                raise
            # The step is wrong as it was pushed. The client misses its answer, and sends the step itself.
            log.debug("a pushed step is refused: %s", refused.failure.reason)
            self._queue.drop(received)
            return
        finally:
            self._computing = None
        self._account.computed(received.inputs.size, self._session.span)
        encoding = step.encoding_of("hidden")
        if goes_on:
            self._push(received, answer, encoding)
        computed_BTD = answer.get("hidden")
        if computed_BTD is not None:
            outputs = computed_BTD[:, step.skip :]
            answer = {"hidden": outputs} if outputs.shape[1] else {}
        else:
            encoding = "raw"
        seconds = asyncio.get_running_loop().time() - began
        result = StepResult(epoch=step.epoch, position=step.position, seconds=seconds)
        if not step.skip and sum(tensor.nbytes for tensor in answer.values()) <= MAX_REPLAYED_RESULT_BYTES:
            self._answered = (result, answer, encoding)
        self._answers.put_nowait((result, answer, encoding))
        self._receipts.computed(step, received.inputs.hidden_BTD, computed_BTD)

    def _push(self, received: ReceivedStep, answer: codec.Tensors, encoding: Encoding) -> None:
        """Push a step's outputs to the downstream server; tell the client if they do not get there."""
        step = received.step

        def done(sent: bool) -> None:
            if not sent:
                self._answers.put_nowait((Unreached(epoch=step.epoch, position=step.position), {}, "raw"))
            self._news.set()

        pushed_step = step.model_copy(update={"hops_left": step.hops_left - 1, "skip": 0, "tensors": ()})
        self._ring.push(pushed_step, lambda: received.inputs.tensors_to_push(answer["hidden"]), encoding, done=done)

    # -- answering ----------------------------------------------------------------------------------------------------

    async def _answer(self) -> None:
        while True:
            message, tensors, encoding = await self._answers.get()
            await self._send(message, tensors, encoding)
            self._answers.task_done()
            self._news.set()

    async def _send(
        self, message: AnyMessage, tensors: codec.Tensors | None = None, encoding: Encoding = "raw"
    ) -> None:
        """Raises `TimeoutError` for a client that does not read: otherwise it would hold its pages for ever."""
        async with asyncio.timeout(self._idle_seconds), self._sending:
            await codec.send(self._stream, message, tensors, encoding)
