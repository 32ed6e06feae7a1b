"""What waits for the compute thread: steps of sessions, and single passes."""

# B sequences, T new tokens, S all tokens of a session, D hidden size

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

from shoal.policy.batching.scheduling import RequestView
from shoal.server.kv.batch import Chunk
from shoal.server.kv.output_head import Answer, joined
from shoal.server.kv.session_cache import SessionCache
from shoal.server.step_inputs import StepInputs, WantedLogits
from shoal.server.training.block_passes import Pieces

T = TypeVar("T")


def _future() -> asyncio.Future[T]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class StepRequest:
    """A step of a session, in the queue or being computed: `num_computed` of its tokens per sequence are done.

    `arrived_at` is in seconds of the loop's clock. `result` becomes the outputs, the logits or the error.
    """

    session: SessionCache
    inputs: StepInputs
    wanted: WantedLogits | None = None
    arrived_at: float = 0.0
    result: asyncio.Future[Answer] = field(default_factory=_future)
    num_computed: int = 0
    answers: list[Answer] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        """The tokens of each sequence that are not computed yet."""
        return self.inputs.num_tokens - self.num_computed

    def view(self) -> RequestView:
        """What the scheduler needs to know of it."""
        session = self.session
        # Recurrent layers of Transformers take no notice of padding in a token that comes alone.
        unsplittable = session.has_states and session.mask_BS is not None
        return RequestView(
            len(session.rows),
            self.num_left,
            session.running,
            session.pages_needed,
            unsplittable,
            most_tokens=session.tokens_in_one_chunk(self.num_left),
            num_past=session.num_tokens,
        )

    def chunk(self, num_tokens: int) -> Chunk:
        """Its next `num_tokens` tokens of each sequence, with pages to put them in."""
        session, inputs = self.session, self.inputs
        part = slice(self.num_computed, self.num_computed + num_tokens)
        growth = session.grow(num_tokens)
        end = session.num_tokens + num_tokens
        return Chunk(
            span=session.span,
            hidden_BTD=inputs.hidden_BTD[:, part],
            positions_BT=None if inputs.positions_BT is None else inputs.positions_BT[:, part],
            mask_BS=None if session.mask_BS is None else session.mask_BS[:, :end],
            num_computed_tokens=session.num_tokens,
            pages=tuple(tuple(row.pages) for row in session.rows),
            growth=growth,
            slots=tuple(row.slot for row in session.rows if row.slot is not None),
            adapters=session.adapters,
            wanted=None if self.wanted is None else self.wanted.before(self.num_left - num_tokens),
        )

    def advance(self, num_tokens: int, answer: Answer) -> None:
        """`num_tokens` more tokens of each sequence are computed, with this answer."""
        self.answers.append(answer)
        self.num_computed += num_tokens
        self.session.record_computed(num_tokens)
        if not self.num_left:
            settle(self.result, joined(self.answers))


@dataclass(eq=False)
class PassRequest(Generic[T]):
    """A single pass, or norms of weights, computed piece by piece. `result` becomes its outcome or the error.

    It counts for `payer`.
    """

    pieces: Pieces[T]
    payer: str = ""
    result: asyncio.Future[T] = field(default_factory=_future)

    def advance(self) -> T | None:
        """Compute the next piece, on the compute thread. Returns the outcome when that was the last one, else None."""
        try:
            next(self.pieces)
        except StopIteration as end:
            return cast(T, end.value)
        return None


def settle(result: asyncio.Future[T], outcome: T | Exception) -> None:
    """Set the outcome, if the caller still waits for it."""
    if result.done():
        return
    if isinstance(outcome, Exception):
        result.set_exception(outcome)
    else:
        result.set_result(outcome)
