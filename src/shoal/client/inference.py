"""A session as its user holds it: a cache in the swarm, over as many calls as he likes."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Self, cast

import torch

from shoal.client.autograd import NoGradient
from shoal.client.chain import Chain
from shoal.client.inputs import check_inputs, mask_of, positions_of
from shoal.client.logits import Asked, Logits
from shoal.client.runtime import Runtime
from shoal.client.session import Session
from shoal.errors import UserError
from shoal.model.factors import Tuning
from shoal.protocol import MAX_BATCH, MAX_LENGTH
from shoal.routing.route import Hop
from shoal.spans import Span

_opened: ContextVar[list[InferenceSession] | None] = ContextVar("_opened", default=None)


@contextlib.contextmanager
def closing_new_sessions() -> Iterator[list[InferenceSession]]:
    """What this thread opens with `new_session` meanwhile; what is still in the list at the end is closed.

    Transformers opens the cache of a `generate()` deep inside, and a traceback would keep it alive.
    """
    opened: list[InferenceSession] = []
    token = _opened.set(opened)
    try:
        yield opened
    finally:
        _opened.reset(token)
        for session in opened:
            session.abandon()
        opened.clear()  # tasks that were started meanwhile, and live on, hold a copy of the context


def note_opened(session: InferenceSession) -> None:
    """Let `closing_new_sessions` know of a session."""
    if (opened := _opened.get()) is not None:
        opened.append(session)


class InferenceSession:
    """A cache in the swarm, for one batch of sequences, over as many calls as you like.

    Give it to `model.generate(..., session=session)`, or `step` through the blocks yourself. It survives the loss of
    servers. Not for several threads at once.
    """

    def __init__(
        self,
        runtime: Runtime,
        chain: Chain,
        span: Span,
        *,
        batch_size: int,
        max_length: int,
        num_prompt_tokens: int = 0,
        tuning: Tuning | None = None,
    ) -> None:
        if not (1 <= batch_size <= MAX_BATCH and 1 <= max_length <= MAX_LENGTH):
            raise UserError(f"a session of {batch_size} sequences of {max_length} tokens: too many, or too few")
        self.max_length = max_length
        self.num_tokens = 0
        self._num_prompt_tokens = num_prompt_tokens
        self.output_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        self._runtime = runtime
        self._session = Session(
            chain, span, batch_size=batch_size, max_length=max_length + num_prompt_tokens, tuning=tuning
        )
        runtime.sessions.add(self._session)
        self._closing = weakref.finalize(self, _close, runtime, self._session)
        self._closing.atexit = False  # by then the loop is gone, and so are the streams

    @property
    def batch_size(self) -> int:
        return self._session.batch_size

    @property
    def servers(self) -> tuple[str, ...]:
        """The peers that hold it at present, in the order of their blocks."""
        return tuple(hop.server.peer for hop in self.hops)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The same with what each of them announces, and the blocks that it computes here."""
        return self._session.hops

    def step(
        self,
        hidden_BTD: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        asked: Asked | None = None,
    ) -> torch.Tensor:
        """Append inputs [B, T, D] and return the blocks' outputs for them. Raises `UserError` when it gets too long.

        `attention_mask` is of these tokens or of all, 0 where a token is padding; without one, they are none.
        If the output head was `asked` for logits and has answered, what is returned means nothing.
        """
        if not self._closing.alive:
            raise UserError("this session is closed")
        check_inputs(hidden_BTD)
        batch_size, num_tokens, _ = hidden_BTD.shape
        position = self.num_tokens and self.num_tokens + self._num_prompt_tokens
        num_tokens -= 0 if position else self._num_prompt_tokens
        if self.num_tokens + num_tokens > self.max_length:
            raise UserError(
                f"{self.num_tokens + num_tokens} tokens in a session of at most {self.max_length}",
                hint="open it with a larger max_length (shoal chat: --max-length, or begin anew with /new)",
            )
        if self.num_tokens == 0:
            self._session.batch_size = batch_size
        elif batch_size % self.batch_size == 0:
            self._spread(batch_size // self.batch_size)
        else:
            raise UserError(f"{batch_size} sequences in a session of {self.batch_size}")
        work = self._session.step(
            hidden_BTD.detach().to("cpu", copy=True).contiguous(),  # kept for a replay; the caller may reuse its own
            position,
            positions_of(position_ids, hidden_BTD),
            mask_of(attention_mask, hidden_BTD, num_past=position),
            None if asked is None else asked.question(hidden_BTD),
        )
        output = self._runtime.run(work)
        self.num_tokens += num_tokens
        if isinstance(output, Logits):
            assert asked is not None
            asked.answer = output.to(hidden_BTD.device)
            output = hidden_BTD.new_zeros(1, 1, 1).expand_as(hidden_BTD)
        return cast(torch.Tensor, NoGradient.apply(output.to(hidden_BTD.device), hidden_BTD))

    def crop(self, num_tokens: int) -> None:
        """Forget everything after the first `num_tokens` tokens."""
        self._session.crop(num_tokens and num_tokens + self._num_prompt_tokens)
        self.num_tokens = min(self.num_tokens, num_tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        """From now on, sequence i continues the one that was `rows[i]`."""
        self._session.select_rows(rows)

    def _spread(self, num_each: int) -> None:
        """Each sequence becomes several: the first step of beams, or of several samples."""
        if num_each > 1:
            self.select_rows([row for row in range(self.batch_size) for _ in range(num_each)])

    def close(self) -> None:
        """Let the servers forget it. May be called twice."""
        if self._closing.detach() is not None and self._runtime.usable:
            self._runtime.run(self._session.close())

    def abandon(self) -> None:
        """Close it without waiting for that."""
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _close(runtime: Runtime, session: Session) -> None:
    runtime.start(session.close())
