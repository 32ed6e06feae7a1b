"""What a server computes: steps of sessions, with a cache, and single forward and backward passes, without.

Requests are checked completely before they are queued, so that whatever reaches the compute thread can be computed, and
a wrong request leaves its session as it was.
"""

# B sequences, T new tokens, S all tokens of a session, D hidden size

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from shoal.errors import UnsupportedOperation
from shoal.model.body import Body
from shoal.model.cache import BodyCache
from shoal.protocol import MAX_BATCH, MAX_STEP_TOKENS, Backward, Failure, Forward, Open, Step, TensorName
from shoal.server.executor import Executor, Priority
from shoal.spans import Span

Tensors = Mapping[TensorName, torch.Tensor]

DECODE_TOKENS = 8
"""Up to so many new tokens of a sequence, somebody is waiting for them: a decoding step, a guess being checked."""
RETRY_SECONDS = 2.0
MOST_WAITING_BYTES = 1 << 30
"""Inputs of single passes that are kept in memory until their turn. Whoever comes with more is asked to come back."""


class Refused(Exception):
    """A request that is not computed; `failure` is what its sender is told."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def rejected(reason: str) -> Refused:
    """The request is wrong, here and everywhere."""
    return Refused(Failure(code="rejected", reason=reason))


def misrouted(reason: str) -> Refused:
    """Another server may well do it."""
    return Refused(Failure(code="misrouted", reason=reason))


class Session:
    """One client's decoding state in this server's blocks."""

    def __init__(self, span: Span, cache: BodyCache, *, batch_size: int, max_length: int) -> None:
        self.span = span
        self.cache = cache
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_tokens = 0
        self.reserved_tokens = 0
        self.mask_BS: torch.Tensor | None = None  # None while no sequence is padded


class Engine:
    """Computes one span of one model for everybody.

    Cache memory is counted in tokens, of one sequence through the whole span: a session reserves all that it may need
    when it opens, so that what was begun can be finished.
    """

    def __init__(
        self, body: Body, executor: Executor, *, model: str, fingerprint: str, cache_tokens: int, max_length: int
    ) -> None:
        self._body = body
        self._hidden_size: int = body.backbone.config.hidden_size
        self._executor = executor
        self._model = model
        self._fingerprint = fingerprint
        self._max_length = max_length
        self.cache_tokens = cache_tokens
        self.cache_tokens_left = cache_tokens
        self._waiting_bytes = 0

    # -- sessions -----------------------------------------------------------------------------------------------------

    def open(self, request: Open) -> Session:
        """A new session with room for all that it asked for. Raises `Refused`."""
        span = self._span_of(request)
        if request.max_length > self._max_length:
            raise rejected(f"a session of {request.max_length} tokens; the model allows {self._max_length}")
        if request.batch_size * request.max_length > self.cache_tokens:
            raise misrouted(
                f"{request.batch_size} sequences of {request.max_length} tokens can never fit into this server's cache "
                f"of {self.cache_tokens} tokens"
            )
        session = Session(
            span, self._body.new_cache(span), batch_size=request.batch_size, max_length=request.max_length
        )
        self._reserve(session, request.batch_size)
        return session

    def close(self, session: Session) -> None:
        """Give a session's room back. May be called twice."""
        self.cache_tokens_left += session.reserved_tokens
        session.reserved_tokens = 0

    async def step(self, session: Session, request: Step, tensors: Tensors) -> torch.Tensor:
        """Append [B, T, D] inputs to a session and return the [B, T, D] outputs. Raises `Refused`."""
        if request.position > session.num_tokens:
            raise rejected(f"position {request.position} of a session with {session.num_tokens} tokens")
        hidden, positions, mask = self._inputs_of(tensors)
        batch_size, num_tokens, _ = hidden.shape
        if request.position == 0:  # nothing is continued: the batch may be another
            if request.rows is not None:
                raise rejected("rows of a session that begins anew")
        else:
            rows = range(session.batch_size) if request.rows is None else request.rows
            if max(rows) >= session.batch_size or len(rows) != batch_size:
                raise rejected(f"{batch_size} sequences that do not continue those of the session")
        if request.position + num_tokens > session.max_length:
            raise rejected(f"{request.position + num_tokens} tokens in a session opened for {session.max_length}")
        if batch_size > MAX_BATCH:
            raise rejected(f"{batch_size} sequences; {MAX_BATCH} are allowed")
        if batch_size * num_tokens > max(MAX_STEP_TOKENS, batch_size):
            raise rejected(f"{batch_size * num_tokens} tokens in one step; {MAX_STEP_TOKENS} are allowed")
        self._reserve(session, batch_size)
        priority = Priority.DECODE if num_tokens <= DECODE_TOKENS else Priority.PREFILL
        return await self._executor.run(priority, lambda: self._step(session, request, hidden, positions, mask))

    def _reserve(self, session: Session, batch_size: int) -> None:
        """Make room for a session of `batch_size` sequences; what was reserved stays reserved until it closes."""
        needed = batch_size * session.max_length - session.reserved_tokens
        if needed <= 0:
            return
        if needed > self.cache_tokens_left:
            reason = f"{needed} cache tokens are needed and {self.cache_tokens_left} are left"
            raise Refused(Failure(code="busy", reason=reason, retry_after=RETRY_SECONDS))
        self.cache_tokens_left -= needed
        session.reserved_tokens += needed

    @torch.inference_mode()
    def _step(
        self,
        session: Session,
        request: Step,
        hidden_BTD: torch.Tensor,
        positions_BT: torch.Tensor | None,
        mask_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        try:
            if request.position == 0:
                session.cache = self._body.new_cache(session.span)
            elif request.position < session.num_tokens:
                session.cache.crop(request.position)
            if request.rows is not None:
                session.cache.select_rows(list(request.rows))
        except UnsupportedOperation as impossible:
            raise Refused(Failure(code="rewind", reason=str(impossible))) from impossible
        session.num_tokens = request.position
        session.batch_size = hidden_BTD.shape[0]
        session.mask_BS = _extend_mask(session.mask_BS, request, hidden_BTD, mask_BT)
        output_BTD = self._through(session.span, hidden_BTD, positions_BT, session.mask_BS, session.cache)
        session.num_tokens += hidden_BTD.shape[1]
        return output_BTD.to(hidden_BTD)

    # -- single passes ------------------------------------------------------------------------------------------------

    async def forward(self, request: Forward, tensors: Tensors) -> torch.Tensor:
        """The [B, T, D] outputs of a span. Raises `Refused`."""
        span = self._span_of(request)
        hidden, positions, mask = self._inputs_of(tensors)
        self._check_length(hidden)

        @torch.inference_mode()
        def compute() -> torch.Tensor:
            return self._through(span, hidden, positions, mask).to(hidden)

        return await self._in_line(tensors, compute)

    async def backward(self, request: Backward, tensors: Tensors) -> torch.Tensor:
        """The gradient [B, T, D] of a span's inputs, its forward pass computed again. Raises `Refused`."""
        span = self._span_of(request)
        hidden, positions, mask = self._inputs_of(tensors)
        self._check_length(hidden)
        grad = tensors.get("grad")
        if grad is None or grad.shape != hidden.shape or not grad.is_floating_point():
            raise rejected("a backward pass needs a gradient of its output's shape")

        @torch.enable_grad()
        def compute() -> torch.Tensor:
            inputs = hidden.requires_grad_(True)
            output = self._through(span, inputs, positions, mask)
            (gradient,) = torch.autograd.grad(output, inputs, grad.to(output))
            return gradient

        return await self._in_line(tensors, compute)

    async def _in_line(self, tensors: Tensors, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute a single pass when it is its turn. Raises `Refused` when too much is waiting already."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._waiting_bytes and self._waiting_bytes + size > MOST_WAITING_BYTES:
            raise Refused(Failure(code="busy", reason="too many passes are waiting", retry_after=RETRY_SECONDS))
        self._waiting_bytes += size
        try:
            return await self._executor.run(Priority.TRAIN, compute)
        finally:
            self._waiting_bytes -= size

    def _through(
        self,
        span: Span,
        hidden_BTD: torch.Tensor,
        positions_BT: torch.Tensor | None,
        mask_BS: torch.Tensor | None,
        cache: BodyCache | None = None,
    ) -> torch.Tensor:
        """The outputs [B, T, D] of a span, computed where its weights are and as precisely as they are."""
        device, dtype = self._body.backbone.device, self._body.backbone.dtype
        return self._body.forward(
            hidden_BTD.to(device, dtype),
            span=span,
            attention_mask=None if mask_BS is None else mask_BS.to(device),
            position_ids=None if positions_BT is None else positions_BT.to(device),
            cache=cache,
        )

    # -- checks -------------------------------------------------------------------------------------------------------

    def _span_of(self, request: Open | Forward | Backward) -> Span:
        if request.model != self._model:
            raise misrouted(f"this server holds blocks of {self._model}")
        if request.fingerprint != self._fingerprint:
            raise misrouted(f"this server's weights are others: {self._fingerprint[:12]}")
        span = Span(request.start, request.end)
        if span not in self._body.span:
            raise misrouted(f"this server holds blocks {self._body.span}, not {span}")
        return span

    def _inputs_of(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        hidden = tensors.get("hidden")
        if hidden is None or hidden.dim() != 3 or not hidden.is_floating_point():
            raise rejected("hidden states must be floating-point numbers of shape [batch, tokens, hidden size]")
        if hidden.shape[2] != self._hidden_size:
            raise rejected(f"hidden size {hidden.shape[2]}; this model's is {self._hidden_size}")
        positions, mask = tensors.get("positions"), tensors.get("mask")
        if positions is not None:
            if positions.shape != hidden.shape[:2] or positions.dtype != torch.int64:
                raise rejected("positions must be int64 of shape [batch, tokens]")
            if positions.min() < 0 or positions.max() >= self._max_length:
                raise rejected(f"positions must be in 0:{self._max_length}")
        if mask is not None and (mask.shape != hidden.shape[:2] or mask.dtype != torch.uint8 or mask.max() > 1):
            raise rejected("the padding mask must be uint8 zeros and ones of shape [batch, tokens]")
        return hidden, positions, None if mask is None else mask.long()

    def _check_length(self, hidden: torch.Tensor) -> None:
        batch_size, num_tokens, _ = hidden.shape
        if num_tokens > self._max_length:
            raise rejected(f"{num_tokens} tokens; the model allows {self._max_length}")
        if batch_size > 1 and batch_size * num_tokens > MAX_STEP_TOKENS:
            raise rejected(f"{batch_size * num_tokens} tokens in one batch; {MAX_STEP_TOKENS} are allowed")


def _extend_mask(
    mask_BS: torch.Tensor | None, request: Step, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor | None
) -> torch.Tensor | None:
    """The session's padding mask after a step: old rows rearranged, cut at the step's position, the new part added."""
    if mask_BT is not None and mask_BT.all():
        mask_BT = None
    if mask_BS is None and mask_BT is None:
        return None
    batch_size, num_tokens, _ = hidden_BTD.shape
    if mask_BS is None or request.position == 0:
        mask_BS = hidden_BTD.new_ones((batch_size, request.position), dtype=torch.int64)
    elif request.rows is not None:
        mask_BS = mask_BS[list(request.rows)]
    if mask_BT is None:
        mask_BT = hidden_BTD.new_ones((batch_size, num_tokens), dtype=torch.int64)
    return torch.cat((mask_BS[:, : request.position], mask_BT), dim=1)
