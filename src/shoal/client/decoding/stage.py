"""A session's part on one server: what that was sent, what it has answered, and what it still has to be told."""

# B sequences, T new tokens, S all tokens, D hidden size, N tokens whose logits are wanted

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import torch

from shoal.client.decoding.outputs import Outputs, Sink
from shoal.client.decoding.pending_step import PendingStep
from shoal.client.head.logits import Logits
from shoal.client.history.history import History
from shoal.client.swarm.connection import Connection, finite, plausible
from shoal.errors import PeerError
from shoal.net.wire.codec import Tensors
from shoal.net.wire.encodings import as_received
from shoal.policy.routing.route import Hop
from shoal.prefix import PAGE_TOKENS
from shoal.protocol import (
    AnyMessage,
    Downstream,
    Leaving,
    NotCached,
    Open,
    Opened,
    Pong,
    Rewind,
    SetNeighbors,
    Step,
    StepResult,
    Unreached,
    Upstream,
)
from shoal.tensors import Encoding

USUAL_OPEN_SECONDS = 0.1
IDLE_PONGS = 2
"""So many answers in a row, the first of which may have crossed the step, say that the step has not come."""
MAX_ADAPTER_UPLOADS = 3
"""A server that forgets its adapters so often has no room for them."""
MAX_STEPS_IN_FLIGHT = 4
"""Steps that are under way to one server: enough to keep it busy while others come, and few enough for its memory."""


class Stage:
    """A session on one server.

    `history` is what its blocks were given. `num_requested` tokens of that the server has been asked to compute, and
    `num_computed` of them it has answered. Decoding, a long prefill and the replay after a failure are all the bringing
    of the second up to the first.
    """

    def __init__(self, hop: Hop, history: History, notify: Callable[[], None]) -> None:
        self.hop = hop
        self.history = history
        self.num_computed = 0
        self.num_requested = 0
        self.epoch: int | None = None  # that the server knows
        self.connection: Connection | None = None
        self.error: PeerError | None = None
        self.is_reported = False
        self.is_rewound = False
        self.is_leaving = False
        self.upstream: Upstream | None = None  # as the server knows them
        self.downstream: Downstream | None = None
        self.requests: deque[PendingStep] = deque()
        self.unreached: Unreached | None = None
        self.is_misled = False
        self.not_cached: NotCached | None = None  # what the server has to be sent before it can open the session
        self._num_uploads = 0
        self._rows: tuple[int, ...] | None = None  # a rearrangement that the server has not been told
        self._results: deque[tuple[StepResult, Tensors]] = deque()  # as they came, not looked at
        self.is_open = False
        self._opened: tuple[Opened, Tensors] | None = None
        self._num_offered = self._num_skipped = 0  # tokens whose names were sent, and whose outputs are not wanted
        self.num_idle_pongs = 0
        self.took: list[tuple[int, float]] = []  # tokens of steps, and the seconds that they took, to be taken note of
        self.has_news = asyncio.Event()
        self.notify = notify

    @property
    def peer(self) -> str:
        return self.hop.server.peer

    @property
    def is_usable(self) -> bool:
        """Whether the server can be asked."""
        return self.connection is not None and self.error is None

    def is_in(self, epoch: int) -> bool:
        """Whether it can be asked for steps of this epoch: nothing of another one is on its way."""
        return self.epoch == epoch or not self.requests

    # -- what the session does with it --------------------------------------------------------------------------------

    def append(self, inputs_BTD: torch.Tensor, start: int) -> None:
        """Add the inputs of the tokens from `start` on, except for those that are known already."""
        assert start <= self.num_tokens
        new_BTD = inputs_BTD[:, self.num_tokens - start :]
        if new_BTD.shape[1]:
            self.history.append(new_BTD)

    @property
    def num_tokens(self) -> int:
        return self.history.num_tokens

    def select_rows(self, rows: Sequence[int]) -> None:
        """The history was rearranged; the server is told before its next step."""
        self.forget_unanswered()
        if self.num_computed:
            self._rows = tuple(rows) if self._rows is None else tuple(self._rows[row] for row in rows)

    def crop(self, num_tokens: int) -> None:
        """Forget what follows, also of what the server was asked and has not answered."""
        self.history.crop(num_tokens)
        self.num_computed = min(self.num_computed, num_tokens)
        self.forget_unanswered()

    def rewind_to(self, position: int) -> None:
        """What it has computed from here on is lost: it has to do it again."""
        self.num_computed = min(self.num_computed, position)
        self.forget_unanswered()

    def forget_unanswered(self) -> None:
        """Whatever it was asked and has not answered may be wrong, or may never have come."""
        self.unrequest_from(self.num_computed)

    def unrequest_from(self, position: int) -> None:
        """The steps from here on have not got to the server."""
        while self.requests and self.requests[-1].position >= position:
            self.requests.pop()
        self.num_requested = min(self.num_requested, position)
        self._await()

    async def disconnect(self, *, goodbye: bool = True) -> None:
        """Give up the server's state; the history stays."""
        connection, self.connection = self.connection, None
        goodbye = goodbye and not self.requests  # a server that hears one does first what it was asked before
        self.num_computed = self.num_requested = self.num_idle_pongs = 0
        self.is_open = False
        self._rows = self.epoch = self.upstream = self.downstream = self.unreached = self._opened = self.not_cached = (
            None
        )
        self.requests.clear()
        self._results.clear()
        if connection is not None:
            await connection.close(goodbye=goodbye)

    async def reset(self) -> None:
        """The server cannot go on with its state: it is to be sent everything again."""
        await self.disconnect()
        self.error, self.is_reported, self.is_rewound = None, False, False

    # -- to the server ------------------------------------------------------------------------------------------------

    def adopt(self, connection: Connection) -> None:
        """From now on, this connection is to its server."""
        self.connection = connection
        connection.heard, connection.ended = self._on_message, self._on_end
        self._on_end()

    async def open(self, request: Open, digests: torch.Tensor | None) -> None:
        """Ask for a session. Raises `PeerError`s."""
        assert self.connection is not None
        self.epoch, self.upstream, self.downstream = request.epoch, request.upstream, request.downstream
        self._num_skipped = request.skip
        self._num_offered = 0 if digests is None else digests.shape[1] * PAGE_TOKENS
        size = 0 if digests is None else digests.nbytes
        self.connection.expect(usual_seconds=USUAL_OPEN_SECONDS, bytes_in_flight=size)
        request = request.model_copy(update={"encoding": self.connection.encoding})
        await self.connection.send(request, {} if digests is None else {"digests": digests})

    async def sync_neighbors(self, epoch: int, upstream: Upstream | None, downstream: Downstream | None) -> None:
        """What the server has to know before the next step, as far as it does not know it. Raises `PeerError`s."""
        assert self.connection is not None
        if (self.upstream, self.downstream) != (upstream, downstream):
            self.upstream, self.downstream = upstream, downstream
            await self.connection.send(SetNeighbors(upstream=upstream, downstream=downstream))
        if self.epoch != epoch:
            rows, self._rows, self.epoch = self._rows, None, epoch
            self.is_rewound = self.num_computed > 0
            rows = rows if self.num_computed else None
            await self.connection.send(Rewind(epoch=epoch, position=self.num_computed, rows=rows))

    async def ask(self, request: PendingStep, tensors: Tensors, *, hops_left: int, last: PendingStep) -> None:
        """Ask for a step, which goes `hops_left` to so many servers, and is the request `last` to the last of them.

        Raises `PeerError`s.
        """
        assert self.connection is not None
        logits_request = last.logits_request
        step = Step(
            epoch=request.epoch,
            position=request.position,
            skip=request.skip,
            hops_left=hops_left,
            logits=None if logits_request is None else last.num_logits,
            top_k=None if logits_request is None else logits_request.top_k,
        )
        await self.connection.send(step, tensors)

    def expect(self, request: PendingStep) -> None:
        """The server is going to answer this."""
        self.requests.append(request)
        self.num_requested = request.end
        self.num_idle_pongs = 0
        self._await()

    def _await(self) -> None:
        if self.connection is not None:
            usual_seconds = sum(request.usual_seconds for request in self.requests) if self.requests else None
            size = sum(request.num_bytes for request in self.requests)
            self.connection.expect(usual_seconds=usual_seconds, bytes_in_flight=size)

    # -- from the server ----------------------------------------------------------------------------------------------

    def _on_end(self) -> None:
        assert self.connection is not None
        self.error = self.error or self.connection.error
        if self.error is not None:
            self._notify()

    def _notify(self) -> None:
        self.has_news.set()
        self.notify()

    def _on_message(self, message: AnyMessage, tensors: Tensors) -> None:
        assert self.connection is not None
        match message:
            case StepResult():
                if self._awaits(message):
                    self._results.append((message, tensors))
            case Opened() if self._opened is None:
                self._opened = message, tensors
            case NotCached() if self._opened is None and self._num_uploads < MAX_ADAPTER_UPLOADS:
                self.not_cached = message
                self._num_uploads += 1
            case Pong():
                self._check_idle(message)
            case Unreached():
                self.unreached = self.unreached or message
            case Leaving():
                self.is_leaving = True
            case _:
                self.connection.fail(self.connection.unasked(message))
        self._notify()

    def _awaits(self, result: StepResult) -> bool:
        """Whether it answers what was asked and is not answered: others are of the past, or nobody asked for them."""
        key = result.epoch, result.position
        is_here = any((each.epoch, each.position) == key for each, _ in self._results)
        return not is_here and any(request.key == key for request in self.requests)

    def _check_idle(self, pong: Pong) -> None:
        """Count how often in a row the server says that it has nothing to do, although an answer is awaited.

        It does not have the step; or it says that it has done it, but the answer would have come before that.
        """
        if self.requests and not self._results and not pong.working:
            self.num_idle_pongs += 1
            if self.num_idle_pongs >= IDLE_PONGS and not self.requests[0].pushed and self.connection is not None:
                self.connection.fail(self.connection.lost("does not do what it was asked"))
        else:
            self.num_idle_pongs = 0

    def opened(self, sink: Sink, *, like: torch.Tensor, wire: Encoding) -> bool:
        """Whether the server has opened the session. What it knew of its beginning goes to `sink`.

        `like` [B, 1, D] are inputs of a token.
        """
        if self.is_open or self._opened is None or self.connection is None or self.error is not None:
            return self.is_open
        opened, tensors = self._opened
        known, outputs = opened.num_tokens, tensors.get("hidden")
        batch_size, _, hidden_size = like.shape
        wrong = known > self._num_offered or (outputs is not None) != (known > self._num_skipped)
        if outputs is not None and not wrong:
            wrong = (
                outputs.shape != (batch_size, known - self._num_skipped, hidden_size)
                or not outputs.is_floating_point()
                or not finite(outputs)
                or opened.encoding_of("hidden") not in ("raw", self.connection.encoding)
            )
        if wrong:
            self.connection.fail(self.connection.lost("it knows something else than was asked"))
            return False
        self.is_open = True
        self.num_computed = self.num_requested = known
        self._await()
        if outputs is not None:
            sink.append(as_received(outputs.to(like.dtype), wire), self._num_skipped)
        return True

    def settle(
        self, sink: Sink, outputs: Outputs, *, wire: Encoding, mask: Callable[[int, int], torch.Tensor | None]
    ) -> bool:
        """Look at what has come: what is right goes to `sink`, logits to `outputs`; a server that is wrong is lost.

        Returns whether anything was right. Whether numbers that are not finite are the server's fault is known only
        once its inputs are. A server may be wrong because it was misled by the one that pushed to it: that is found out
        by asking it again.
        """
        has_progress = False
        while self._results and self.connection is not None and self.error is None:
            result, tensors = self._results[0]
            request = self.requests[0] if self.requests else None
            if request is None or (result.epoch, result.position) != request.key:
                self._results.popleft()  # of the past
                continue
            wrong = request.wrong(result, tensors, self.connection.encoding)
            answer = tensors.get("hidden" if request.logits_request is None else "logits")
            if wrong is None and answer is not None and not finite(answer):
                if self.history.num_tokens < request.end:
                    break
                inputs = self.history.between(request.position, request.end)
                if not plausible(answer, inputs, mask(request.position, request.end)):
                    wrong = "with numbers that are not finite"
            if wrong is not None:
                if request.pushed:
                    self.is_misled = True
                else:
                    self.connection.fail(self.connection.wrong(wrong))
                break
            has_progress = True
            self._results.popleft()
            self.requests.popleft()
            self.num_computed, self.num_idle_pongs = request.end, 0
            self._await()
            if result.seconds is not None:
                self.took.append((request.inputs[0] * request.inputs[1], result.seconds))
            if request.logits_request is not None:
                if answer is not None:
                    outputs.logits.append(Logits(answer, tensors.get("ids")))
            elif answer is not None:
                if result.encoding_of("hidden") != wire:
                    # The same from a server that does not know the encoding: which one it was makes no difference.
                    answer = as_received(answer, wire)
                sink.append(answer, request.position + request.skip)
        return has_progress
