"""The streams that peers open to a server, each from its first message to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import torch

from shoal import events
from shoal.concurrency import owned_task
from shoal.net.signing.token_digests import tensor_digest_aside
from shoal.net.transport import Stream, StreamBroken
from shoal.net.wire import codec
from shoal.policy.contribution.credit import BACKWARD
from shoal.protocol import (
    Acknowledge,
    Adapter,
    AdapterStored,
    AnyMessage,
    Backward,
    Close,
    Failure,
    Forward,
    GetHeld,
    GetInvitation,
    GetManifest,
    GetPiece,
    Introduce,
    Norms,
    NormsResult,
    NotCached,
    Open,
    PassInputs,
    PassResult,
    Ping,
    Pong,
    ProtocolViolation,
    Step,
    SumResult,
    TakeSum,
    Transfer,
)
from shoal.server.engine.engine import Engine
from shoal.server.executor import alone
from shoal.server.refusals import Refused, failure_of, rejected
from shoal.server.rpc.message_reader import MessageReader
from shoal.server.rpc.ping_pace import INTRODUCTIONS_PER_SECOND, PingPace, payer_behind
from shoal.server.rpc.pushing.pass_pushes import PassPushes
from shoal.server.rpc.pushing.push_service import PushService
from shoal.server.rpc.session_stream import SessionStream
from shoal.server.rpc.stream_account import StreamAccount
from shoal.server.rpc.transfer_service import TransferService
from shoal.server.rpc.weights_service import WeightsService
from shoal.server.training.adapter_store import MissingFromCache
from shoal.spans import Span
from shoal.tensors import Encoding, TensorName

log = logging.getLogger(__name__)
T = TypeVar("T")

FAILURE_SEND_SECONDS = 2.0
"""How long the server tries to tell a client why its stream ends: a client that does not read must not delay it."""


class Handler:
    """Answers each stream's messages, one after another. A failure is told to the client, and ends its stream only."""

    def __init__(
        self, engine: Engine, push_service: PushService, *, idle_seconds: float, weights: WeightsService | None = None
    ) -> None:
        self._engine = engine
        self._push_service = push_service
        self._weights = weights or WeightsService()
        self._transfers = TransferService()
        self._ping_pace = PingPace()
        self._introduction_pace = PingPace(INTRODUCTIONS_PER_SECOND)
        self._idle_seconds = idle_seconds
        self._sessions: set[SessionStream] = set()
        self._ended = asyncio.Event()
        self._farewell: Failure | None = None  # what is answered to new requests while the server drains
        self._num_passes = 0  # that are computed for clients now
        self._stream_tasks: set[asyncio.Task[Any]] = set()  # the transport's, one for each stream
        self._num_streams = Counter[str]()  # of each peer
        self._is_leaving = False

    async def drain(self, seconds: float, *, farewell: Failure) -> None:
        """Refuse new sessions and passes, and ask clients to take the open sessions elsewhere.

        Returns when these sessions, and the passes that are being computed, have ended, and clients have taken the sums
        of their gradients: after `seconds` at the latest.
        `farewell` is what clients are told that ask for something new.
        """
        self._farewell = farewell
        deadline = asyncio.get_running_loop().time() + seconds
        if self._sessions:
            log.warning("%d sessions have %.0f s to go on elsewhere", len(self._sessions), seconds)
        for session in self._sessions:
            session.leave(seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._wait_for_answers()
                await self._engine.passes.sums.wait_until_taken()
                await self._wait_for_answers()  # the last sum may be on its way

    async def _wait_for_answers(self) -> None:
        while self._sessions or self._num_passes:
            self._ended.clear()
            await self._ended.wait()

    async def leave(self, farewell: Failure) -> None:
        """End all streams, now and from now on, and tell their clients why."""
        self._farewell, self._is_leaving = farewell, True
        tasks = self._stream_tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __call__(self, stream: Stream) -> None:
        """Serve one stream until it ends."""
        stream_task = asyncio.current_task()
        assert stream_task is not None
        self._stream_tasks.add(stream_task)
        self._num_streams[stream.peer] += 1
        try:
            if self._is_leaving:
                raise asyncio.CancelledError
            await self._serve_stream(stream)
        except asyncio.CancelledError:
            if not self._is_leaving:
                raise
            assert self._farewell is not None
            await _fail(stream, self._farewell)
        except StreamBroken:
            log.debug("%s closed the stream", stream.peer)
        except TimeoutError:
            log.debug("%s sent or read nothing for %.0f s", stream.peer, self._idle_seconds)
        except (ProtocolViolation, Refused) as refusal:
            await _fail(stream, failure_of(refusal))
        except Exception as error:  # a model's code may raise anything: this client is told, the others go on
            log.exception("a request of %s failed", stream.peer)
            await _fail(stream, failure_of(error))
        finally:
            self._stream_tasks.discard(stream_task)
            self._num_streams[stream.peer] -= 1
            if not self._num_streams[stream.peer]:
                del self._num_streams[stream.peer]
                self._engine.passes.release(stream.peer)
            await stream.close()

    async def _serve_stream(self, stream: Stream) -> None:
        goes_on, account, pushes = True, StreamAccount(stream, self._engine), PassPushes(self._push_service)
        async with MessageReader(stream, self._engine.validator.check_declared) as reader:
            try:
                while goes_on and not reader.is_closed:
                    async with asyncio.timeout(self._idle_seconds):
                        message, tensors = await reader.next()
                    try:
                        goes_on = await self._answer(stream, reader, account, pushes, message, tensors)
                    except MissingFromCache as missing:
                        lacks = NotCached(adapters=missing.adapters, kept=missing.activations, inputs=missing.inputs)
                        await self._send(stream, lacks)
            finally:
                pushes.close()
                account.leave()

    async def _answer(
        self,
        stream: Stream,
        reader: MessageReader,
        account: StreamAccount,
        pushes: PassPushes,
        message: AnyMessage,
        tensors: codec.Tensors,
    ) -> bool:
        """Do what a message asks for. Returns whether the stream goes on."""
        match message:
            case Introduce():
                await self._introduction_pace.turn(payer_behind(stream))
                await account.introduce(message)
            case Acknowledge():
                await self._ping_pace.turn(payer_behind(stream))
                await account.acknowledged(message)
            case Ping():
                await self._ping_pace.turn(payer_behind(stream))
                await self._send(stream, self._pong(working=False))
            case Close():
                return False
            case Open():
                await self._hold_session(stream, account, message, tensors)
                return False
            case PassInputs() | Step() if message.link is not None:
                await self._push_service.receive_pushes(
                    stream,
                    message,
                    tensors,
                    check=self._engine.validator.check_declared,
                    idle_seconds=self._idle_seconds,
                )
                return False
            case Transfer():
                await self._transfers.answer(stream, message)
            case GetInvitation() | GetManifest() | GetHeld() | GetPiece():
                await self._weights.answer(stream, message)
            case Adapter():
                payer = payer_behind(stream)
                name = await self._engine.store_adapter(stream.peer, message, tensors, payer=payer)
                stored = events.AdapterStored(stream.peer, name, tensors["factors"].nbytes)
                self._engine.observers.emit(stored)
                await self._send(stream, AdapterStored())
            case Norms():
                self._check_stays()
                with self._counting_pass():
                    computing = self._engine.passes.norms(message, payer=payer_behind(stream))
                    norms = await self._while_answering_pings(stream, reader, account, computing)
                    await self._send(stream, NormsResult(), {"factors": norms})
            case Forward() | Backward():
                self._check_stays()
                with self._counting_pass():
                    passing = self._pass(stream, account, pushes, message, tensors)
                    result, outcome, encoding = await self._while_answering_pings(
                        stream, reader, account, passing, is_working=lambda: not pushes.is_waiting
                    )
                    await self._send(stream, result, outcome, encoding)
            case TakeSum():
                with self._counting_pass():  # also while the server drains: it waits until its sums are taken
                    taken = await self._engine.passes.take_sum(stream.peer, message)
                    answer = SumResult(num_passes=taken.num_passes, unused=taken.unused)
                    await self._send(stream, answer, {"factor_grads": taken.factors_N})
            case _:
                raise rejected(f"a message of kind {message.kind!r} makes no sense here")
        return True

    async def _pass(
        self,
        stream: Stream,
        account: StreamAccount,
        pushes: PassPushes,
        request: Forward | Backward,
        tensors: codec.Tensors,
    ) -> tuple[PassResult, codec.Tensors, Encoding]:
        """Compute a pass, and push its outputs on if another server waits for them. Returns what the client is told."""
        if request.upstream is not None or request.downstream is not None:
            self._engine.passes.check(stream.peer, request)
        if request.downstream is not None:
            pushes.prepare(request.downstream)
        if request.upstream is None:
            encoding = request.encoding_of(request.pushed)
            result, outcome = await self._computed(stream, request, tensors)
        else:
            async with asyncio.timeout(self._idle_seconds):
                inputs_BTD = await pushes.receive(request)
            encoding, tensors = request.encoding, {**tensors, request.pushed: inputs_BTD}
            async with owned_task(
                tensor_digest_aside(inputs_BTD, lambda digest: asyncio.to_thread(alone, digest))
            ) as digesting:
                try:
                    result, outcome = await self._computed(stream, request, tensors)
                except Refused as refused:
                    if not refused.is_request_at_fault:
                        raise
                    # It may be wrong as it was pushed, which is not the client's fault: it sends the inputs itself.
                    log.debug("pushed inputs are refused: %s", refused.failure.reason)
                    raise MissingFromCache(inputs=True) from None
                result = result.model_copy(update={"inputs": await digesting})
        num_tokens = tensors[request.pushed].shape[:2].numel()
        times = BACKWARD if isinstance(request, Backward) else 1
        account.computed(num_tokens, Span(request.start, request.end), times=times)
        if request.downstream is not None and request.pushed in outcome:
            await pushes.push(request.downstream, {request.pushed: outcome[request.pushed]}, encoding)
        return result, outcome, encoding

    async def _computed(
        self, stream: Stream, request: Forward | Backward, tensors: codec.Tensors
    ) -> tuple[PassResult, codec.Tensors]:
        validator, passes = self._engine.validator, self._engine.passes
        peer, payer = stream.peer, payer_behind(stream)
        if isinstance(request, Forward):
            inputs = validator.pass_inputs(tensors)
            outputs_BTD = await passes.forward(peer, request, inputs, payer=payer)
            return PassResult(), {"hidden": outputs_BTD.to(inputs.hidden_BTD)}
        grad_BTD, inputs_or_none = validator.backward_inputs(request, tensors)
        found = await passes.backward(peer, request, grad_BTD, inputs_or_none, payer=payer)
        answer: dict[TensorName, torch.Tensor] = {}
        if found.inputs_BTD is not None:
            answer["grad"] = found.inputs_BTD.to(grad_BTD)
        if found.factors_N is not None:
            answer["factor_grads"] = found.factors_N
        return PassResult(unused=found.unused, summed=found.are_summed), answer

    @contextlib.contextmanager
    def _counting_pass(self) -> Iterator[None]:
        """A pass is computed and answered in this context, or a sum of several is."""
        self._num_passes += 1
        try:
            yield
        finally:
            self._num_passes -= 1
            self._ended.set()

    def _check_stays(self) -> None:
        """Raises `Refused` if the server takes no new sessions and passes."""
        if self._farewell is not None:
            raise Refused(self._farewell)

    async def _hold_session(
        self, stream: Stream, account: StreamAccount, request: Open, tensors: codec.Tensors
    ) -> None:
        self._check_stays()
        session = SessionStream(
            stream,
            self._engine,
            self._push_service,
            account=account,
            ping_pace=self._ping_pace,
            idle_seconds=self._idle_seconds,
        )
        self._sessions.add(session)
        try:
            await session.run(request, tensors)
        finally:
            self._sessions.discard(session)
            self._ended.set()

    async def _while_answering_pings(
        self,
        stream: Stream,
        reader: MessageReader,
        account: StreamAccount,
        work: Coroutine[Any, Any, T],
        *,
        is_working: Callable[[], bool] = lambda: True,
    ) -> T:
        """The outcome of `work`, while pings are answered and acknowledgements taken.

        Raises what `work` raises. The work is dropped when the client is gone, also after its `Close` (`StreamBroken`),
        and when it asks for something else before this is answered (`Refused`): requests must not pile up here.
        """
        async with owned_task(work) as computing:
            while not computing.done():
                await asyncio.wait({computing, reader.receiving()}, return_when=asyncio.FIRST_COMPLETED)
                if reader.receiving().done():
                    message, _ = await reader.next()
                    if isinstance(message, Ping):
                        await self._ping_pace.turn(payer_behind(stream))
                        await self._send(stream, self._pong(working=is_working()))
                    elif isinstance(message, Acknowledge):
                        await self._ping_pace.turn(payer_behind(stream))
                        await account.acknowledged(message)
                    elif not isinstance(message, Close):
                        raise rejected(f"a message of kind {message.kind!r} before the last one is answered")
            try:
                return computing.result()
            finally:
                del computing  # the traceback of its error has this frame: a circle, which would keep the inputs

    def _pong(self, *, working: bool) -> Pong:
        return Pong(
            working=working,
            num_passes=self._engine.num_passes,
            queue_length=self._engine.queue_length,
            cache_tokens_left=self._engine.cache_tokens_left,
        )

    async def _send(
        self, stream: Stream, message: AnyMessage, tensors: codec.Tensors | None = None, encoding: Encoding = "raw"
    ) -> None:
        """Raises `TimeoutError` for a client that does not read: otherwise it would hold its pages for ever."""
        async with asyncio.timeout(self._idle_seconds):
            await codec.send(stream, message, tensors, encoding)


async def _fail(stream: Stream, failure: Failure) -> None:
    with contextlib.suppress(StreamBroken, TimeoutError):
        async with asyncio.timeout(FAILURE_SEND_SECONDS):
            await codec.send(stream, failure)
