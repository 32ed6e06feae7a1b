"""A session on one server: the client's side of the talk with that server.

A `Stage` sends what the server has to know and to compute, and checks what the server says. How far the server has come
is a frozen value, its `progress` (`shoal.client.decoding.progress`). The stage alone replaces it. The pipeline decides
what to ask next.
"""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from shoal.client.decoding.outputs import NoOutputs, Outputs, Sink
from shoal.client.decoding.pending_step import Opening, PendingStep
from shoal.client.decoding.progress import StageProgress, StageStatus
from shoal.client.decoding.receipts.stage_receipts import StageReceipts
from shoal.client.head.logits import Logits
from shoal.client.history.history import History
from shoal.client.swarm.adapter_sync import MAX_ADAPTER_UPLOADS
from shoal.client.swarm.answers import finite, plausible, rounded_like
from shoal.client.swarm.connection import Connection
from shoal.errors import PeerError
from shoal.net.wire.codec import Tensors
from shoal.net.wire.encodings import as_received
from shoal.policy.routing.route import Hop
from shoal.protocol import (
    AnyMessage,
    Downstream,
    Leaving,
    NotCached,
    Open,
    Opened,
    Pong,
    Receipt,
    Rewind,
    SetNeighbors,
    Step,
    StepResult,
    Unreached,
    Upstream,
)
from shoal.tensors import Encoding

USUAL_OPEN_SECONDS = 0.1
"""How long a server usually takes to open a session."""
IDLE_PONGS = 2
"""A server that says this often in a row that it is idle does not have the step. The first pong may have crossed it."""

Neighbors = tuple[Upstream | None, Downstream | None]
"""The servers before and after one in the ring; None where that is the client."""
Mask = Callable[[int, int], torch.Tensor | None]
"""The padding mask of the tokens between two positions; None if no token is padding."""


class Stage:
    """A session on the server of a hop.

    `history` has the inputs of its first block. `notify` is called when something came from the server.
    """

    def __init__(self, hop: Hop, history: History, notify: Callable[[], None]) -> None:
        self.hop = hop
        self.history = history
        self.notify = notify
        self.has_news = asyncio.Event()
        self.status = StageStatus.CLOSED
        self.error: PeerError | None = None
        self.connection: Connection | None = None
        self.progress = StageProgress()
        self.is_leaving = False
        """Whether the session should move to another server. The server still answers."""
        self.unreached: Unreached | None = None
        """What the server said of a step that it could not push to the next."""
        self.answered_from: int | None = None
        """The first token whose outputs are of this server; None before it gave any."""
        self.receipts = StageReceipts()
        """What the server signs, and what the client has to compare with it."""
        self._neighbors: Neighbors = None, None  # as the server knows them
        self._opening: Opening | NotCached | None = None
        self._num_uploads = 0
        self._results: deque[tuple[StepResult, Tensors]] = deque()  # as they came, unchecked
        self._timings: list[tuple[int, float]] = []

    @property
    def peer(self) -> str:
        """The peer id of its server."""
        return self.hop.server.peer

    @property
    def num_tokens(self) -> int:
        """How many of its inputs the client knows."""
        return self.history.num_tokens

    @property
    def is_open(self) -> bool:
        """Whether the server can be asked."""
        return self.status.is_open

    @property
    def needs_opening(self) -> bool:
        """Whether the server has not opened the session, and nothing keeps it from doing so."""
        return self.status in (StageStatus.CLOSED, StageStatus.OPENING)

    @property
    def has_failed(self) -> bool:
        """Whether the server is of no more use."""
        return self.status in (StageStatus.FAILED, StageStatus.REPORTED)

    @property
    def num_unsettled(self) -> int:
        """How many answers have come and were not looked at."""
        return len(self._results)

    @property
    def not_cached(self) -> NotCached | None:
        """The adapters that the server has to be sent before it can open the session."""
        return self._opening if isinstance(self._opening, NotCached) else None

    @property
    def num_said_cached(self) -> int:
        """How many tokens the server said that it had in its cache, until that was looked at; 0 before it answers."""
        return self._opening.num_said if self.needs_opening and isinstance(self._opening, Opening) else 0

    @property
    def offers_cached(self) -> bool:
        """Whether the answer to the opening may bring the outputs of tokens that the server has in its cache."""
        return isinstance(self._opening, Opening) and self._opening.num_offered > self._opening.num_skipped

    def take_timings(self) -> list[tuple[int, float]]:
        """The tokens of each step that was answered since the last call, and the seconds that it took."""
        timings, self._timings = self._timings, []
        return timings

    # -- what the session does with it --------------------------------------------------------------------------------

    def append(self, inputs_BTD: torch.Tensor, start: int) -> None:
        """Add the inputs of the tokens from `start` on, except for those that are known already."""
        assert start <= self.num_tokens
        new_BTD = inputs_BTD[:, self.num_tokens - start :]
        if new_BTD.shape[1]:
            self.history.append(new_BTD)

    def select_rows(self, rows: Sequence[int]) -> None:
        """The history was rearranged. The server is told before its next step."""
        self._advance(self.progress.rearranged(rows))

    def crop(self, num_tokens: int) -> None:
        """Forget all tokens after the first `num_tokens`, those included that the server has not answered."""
        self.history.crop(num_tokens)
        self.rewind_to(num_tokens)

    def rewind_to(self, position: int) -> None:
        """Let the server compute everything from `position` on again."""
        self._advance(self.progress.rewound_to(position))

    def forget_pending(self) -> None:
        """Ask again for everything that is not answered: the inputs may have been wrong, or may not have arrived."""
        self.unrequest_from(self.progress.num_computed)

    def unrequest_from(self, position: int) -> None:
        """Ask again for the steps from `position` on: they did not get to the server."""
        self._advance(self.progress.unrequested_from(position))

    def forget_idle_pongs(self) -> None:
        """The server cannot have the step yet, and is rightly idle."""
        self.progress = self.progress.ponged(idle=False)

    def take_unreached(self) -> Unreached | None:
        """The first push that the server said had failed, once."""
        unreached, self.unreached = self.unreached, None
        return unreached

    def leave(self) -> None:
        """The session should move to another server."""
        self.is_leaving = True

    def fail(self, error: PeerError) -> None:
        """The server is of no more use. The first reason counts."""
        if not self.has_failed:
            self.error, self.status = error, StageStatus.FAILED

    def mark_reported(self) -> None:
        """The session has seen the error."""
        assert self.has_failed
        self.status = StageStatus.REPORTED

    async def disconnect(self, *, goodbye: bool = True) -> None:
        """Give up the server's state. The history stays, and so does the error of a server that failed."""
        connection, self.connection = self.connection, None
        goodbye = goodbye and not self.progress.pending  # a server finishes what it was asked before it hears a goodbye
        self.progress = self.progress.disconnected()
        self.has_news.set()
        self.unreached, self._opening, self._neighbors = None, None, (None, None)
        self._results.clear()
        if not self.has_failed:
            self.status = StageStatus.CLOSED
        if connection is not None:
            await connection.close(goodbye=goodbye)

    async def reset(self) -> None:
        """The server cannot go on with its state, but is sound: it is to be sent everything again."""
        await self.disconnect()
        self.error, self.status = None, StageStatus.CLOSED

    # -- to the server ------------------------------------------------------------------------------------------------

    def adopt(self, connection: Connection) -> None:
        """Use this connection from now on."""
        self.connection, self.status = connection, StageStatus.OPENING
        connection.on_message, connection.on_end = self._on_message, self._on_end
        self._on_end()

    async def open(self, request: Open, digests: torch.Tensor | None) -> None:
        """Ask for a session. `digests` [B, pages, 16] name its first tokens. Raises `PeerError`s."""
        assert self.connection is not None
        self.progress = self.progress.entered_epoch(request.epoch)
        self._neighbors = request.upstream, request.downstream
        self.receipts = StageReceipts(request.receipts)
        self._opening = Opening.of(request, digests)
        size = 0 if digests is None else digests.nbytes
        self.connection.expect(usual_seconds=USUAL_OPEN_SECONDS, bytes_in_flight=size)
        request = request.model_copy(update={"encoding": self.connection.encoding})
        await self.connection.send(request, {} if digests is None else {"digests": digests})

    async def sync(self, epoch: int, neighbors: Neighbors) -> None:
        """Tell the server its neighbors and the epoch, as far as it does not know them. Raises `PeerError`s."""
        connection = self.connection
        assert connection is not None
        if self._neighbors != neighbors:
            self._neighbors = neighbors
            await connection.send(SetNeighbors(upstream=neighbors[0], downstream=neighbors[1]))
        if self.connection is connection and self.progress.epoch != epoch:  # it may have been closed meanwhile
            rewind = Rewind(epoch=epoch, position=self.progress.num_computed, rows=self.progress.rows)
            self.progress = self.progress.entered_epoch(epoch)
            await connection.send(rewind)

    def expect(self, step: PendingStep) -> None:
        """The server is going to get this step, from the client or from the server before it."""
        self._advance(self.progress.requested(step))

    async def send(self, step: PendingStep, tensors: Tensors, *, hops_left: int, last: PendingStep) -> None:
        """Send a step, which `hops_left` more servers get after this one; `last` is the step of the last of them.

        Raises `PeerError`s.
        """
        assert self.connection is not None
        connection, receipts = self.connection, self.receipts  # they may be others once it is sent
        logits_request = last.logits_request
        message = Step(
            epoch=step.epoch,
            position=step.position,
            skip=step.skip,
            hops_left=hops_left,
            logits=None if logits_request is None else last.num_logits,
            top_k=None if logits_request is None else logits_request.top_k,
        )
        await connection.send(message, tensors)
        receipts.sent(step, tensors["hidden"], connection.encoding)

    def _advance(self, progress: StageProgress) -> None:
        """Replace the progress, and tell the connection which answers to expect now."""
        if self.status is StageStatus.MISLED and progress.pending[:1] != self.progress.pending[:1]:
            self.status = StageStatus.OPEN
        self.progress = progress
        self.receipts.rewound(num_computed=progress.num_computed, num_requested=progress.num_requested)
        if self.connection is not None:
            usual_seconds = sum(step.usual_seconds for step in progress.pending) if progress.pending else None
            size = sum(step.num_bytes for step in progress.pending)
            self.connection.expect(usual_seconds=usual_seconds, bytes_in_flight=size)

    # -- from the server ----------------------------------------------------------------------------------------------

    def _on_end(self) -> None:
        assert self.connection is not None
        if self.connection.error is not None:
            self.fail(self.connection.error)
            self._notify()

    def _notify(self) -> None:
        self.has_news.set()
        self.notify()

    def _on_message(self, message: AnyMessage, tensors: Tensors) -> None:
        assert self.connection is not None
        opening = self._opening if isinstance(self._opening, Opening) and self._opening.answer is None else None
        match message:
            case StepResult():
                if self._is_new(message):
                    self._results.append((message, tensors))
            case Opened() if opening is not None:
                self._opening = replace(opening, answer=(message, tensors))
            case NotCached() if opening is not None and self._num_uploads < MAX_ADAPTER_UPLOADS:
                self._opening = message
                self._num_uploads += 1
            case Pong():
                self._check_idle(message)
            case Unreached():
                self.unreached = self.unreached or message
            case Leaving():
                self.leave()
            case Receipt() if self.receipts.add(message):
                return  # it is looked at with the next answer
            case _:
                self.connection.fail(self.connection.unasked(message))
        self._notify()

    def _is_new(self, result: StepResult) -> bool:
        """Whether it is the first answer to a pending step. Other results are late, or were never asked for."""
        key = result.epoch, result.position
        return self.progress.awaits(*key) and all((each.epoch, each.position) != key for each, _ in self._results)

    def _check_idle(self, pong: Pong) -> None:
        """A server that is idle although an answer is awaited does not have the step, or has lost the answer."""
        pending = self.progress.pending
        self.progress = self.progress.ponged(idle=bool(pending) and not self._results and not pong.working)
        is_idle = self.progress.num_idle_pongs >= IDLE_PONGS
        if is_idle and not pending[0].pushed and self.connection is not None:
            self.connection.fail(self.connection.lost("does not do what it was asked"))

    def settle_opening(self, sink: Sink, *, like: torch.Tensor, wire: Encoding) -> bool:
        """Look at the answer to `open`; returns whether the session is open.

        The outputs of the tokens that the server had in its cache go to `sink`. `like` [B, 1, D] are inputs of a token.
        """
        opening = self._opening
        if self.status is not StageStatus.OPENING or not isinstance(opening, Opening) or opening.answer is None:
            return self.is_open
        assert self.connection is not None
        opened, tensors = opening.answer
        outputs = tensors.get("hidden")
        if opening.is_wrong(opened, outputs, like, self.connection.encoding):
            self.connection.fail(self.connection.lost("it knows something else than was asked"))
            return False
        self.status = StageStatus.OPEN
        self._advance(self.progress.opened_with(opened.num_tokens))
        if outputs is not None:
            self._deliver(as_received(outputs.to(like.dtype), wire), opening.num_skipped, sink)
        return True

    def settle(self, sink: Sink, outputs: Outputs, *, wire: Encoding, mask: Mask) -> bool:
        """Look at the answers that have come; returns whether any was right.

        Outputs go to `sink`, logits to `outputs`. A server whose answer is wrong is lost, except if another server
        pushed the step: that one may have misled it, which shows when the client asks it itself.
        """
        has_progress = False
        while self._results and self.is_open and self.connection is not None:
            result, tensors = self._results[0]
            step = self.progress.pending[0] if self.progress.pending else None
            if step is None or (result.epoch, result.position) != step.key:
                self._results.popleft()  # of the past
                continue
            wrong = step.wrong(result, tensors, self.connection.encoding)
            answer = tensors.get("hidden" if step.logits_request is None else "logits")
            if wrong is None and answer is not None and not finite(answer):
                if self.num_tokens < step.end:
                    break  # whether that is the server's fault depends on its inputs
                inputs_BTD = self.history.between(step.position, step.end)
                if not plausible(answer, inputs_BTD, mask(step.position, step.end)):
                    wrong = "with numbers that are not finite"
            if wrong is not None:
                if step.pushed:
                    self.status = StageStatus.MISLED
                else:
                    self.connection.fail(self.connection.wrong(wrong))
                break
            has_progress = True
            self._results.popleft()
            self._take(step, result, tensors, sink, outputs, wire)
        return has_progress

    def _take(
        self, step: PendingStep, result: StepResult, tensors: Tensors, sink: Sink, outputs: Outputs, wire: Encoding
    ) -> None:
        """Take a right answer to the oldest pending step."""
        self._advance(self.progress.answered())
        self.receipts.answered(step, tensors.get("hidden"), result.encoding_of("hidden"))
        if self.connection is not None and self.connection.tab is not None:
            self.connection.tab.add(step.inputs[:2].numel(), self.hop.span)
        if result.seconds is not None:
            self._timings.append((step.inputs[0] * step.inputs[1], result.seconds))
        if step.logits_request is not None:
            if (logits := tensors.get("logits")) is not None:
                outputs.logits.append(Logits(logits, tensors.get("ids")))
                if self.answered_from is None:
                    self.answered_from = step.end - step.num_logits
        elif (hidden_BTD := tensors.get("hidden")) is not None:
            hidden_BTD = rounded_like(hidden_BTD, result.encoding_of("hidden"), wire=wire)
            self._deliver(hidden_BTD, step.position + step.skip, sink)

    def _deliver(self, outputs_BTD: torch.Tensor, start: int, sink: Sink) -> None:
        if self.answered_from is None and not isinstance(sink, NoOutputs):
            self.answered_from = sink.num_tokens
        sink.append(outputs_BTD, start)
