"""A session as its user holds it: a cache in the swarm, over as many calls as he likes."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast

import torch

from shoal.client.active import enter, leave
from shoal.client.call_inputs import check_inputs, mask_of, positions_of
from shoal.client.decoding.session import Session
from shoal.client.decoding.state import SessionState
from shoal.client.head.logits import HeadCall, Logits
from shoal.client.runtime import Runtime
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.autograd import NoGradient
from shoal.errors import UserError
from shoal.model.peft.factors import ActiveAdapters
from shoal.policy.routing.route import Hop
from shoal.protocol import MAX_BATCH, MAX_LENGTH
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


@dataclass
class _Deferred:
    """Inputs of a session whose outputs are known already: servers compute them when others follow."""

    hidden_BTD: torch.Tensor
    positions_BT: torch.Tensor | None
    mask_BT: torch.Tensor | None

    def change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Rearrange or shorten all of it."""
        self.hidden_BTD = change(self.hidden_BTD)
        self.positions_BT = None if self.positions_BT is None else change(self.positions_BT)
        self.mask_BT = None if self.mask_BT is None else change(self.mask_BT)


class InferenceSession:
    """A cache in the swarm, for one batch of sequences, over as many calls as you like.

    Inside `with model.inference_session() as session:`, calls of `model.generate()` and of the model go on with it;
    elsewhere give it to `model.generate(..., session=session)`, or `step` through the blocks yourself. It survives the
    loss of servers. Not for several threads at once.

    It gets at most `max_length` tokens long. Servers are chosen that have room for `expected_length` of them, by
    default for all. `owner` says whose active session it may be.
    """

    def __init__(
        self,
        runtime: Runtime,
        swarm: Swarm,
        span: Span,
        *,
        batch_size: int,
        max_length: int,
        expected_length: int | None = None,
        num_prompt_tokens: int = 0,
        tuning: ActiveAdapters | None = None,
        owner: object = None,
    ) -> None:
        if not (1 <= batch_size <= MAX_BATCH and 1 <= max_length <= MAX_LENGTH):
            raise UserError(f"a session of {batch_size} sequences of {max_length} tokens: too many, or too few")
        self.max_length = max_length
        self.owner = owner
        self.num_tokens = 0
        self.output_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        self.in_call = False
        """Whether a call of `generate()` keeps account of the tokens: one that was interrupted has left some."""
        self._num_prompt_tokens = num_prompt_tokens
        self._deferred: _Deferred | None = None
        self._runtime = runtime
        self._session = Session(
            swarm,
            span,
            batch_size=batch_size,
            max_length=max_length + num_prompt_tokens,
            expected_length=None if expected_length is None else expected_length + num_prompt_tokens,
            tuning=tuning,
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

    @property
    def state(self) -> SessionState:
        """How far each server has come, and which are kept warm, at this moment."""
        return self._session.state

    @property
    def is_closed(self) -> bool:
        return not self._closing.alive

    @property
    def position(self) -> int:
        """How many tokens it has read. Set it to go back: what follows is forgotten, the text of it too."""
        if self.output_ids is None:
            return 0 if self.in_call else self.num_tokens
        num_told = self.output_ids.shape[1] - 1  # the last token of a text is read by the next call
        return num_told if self.in_call else max(num_told, self.num_tokens)

    @position.setter
    def position(self, num_tokens: int) -> None:
        if not 0 <= num_tokens <= self.position:
            raise UserError(
                f"position {num_tokens} of a session that has read {self.position} tokens",
                hint="a session goes back by its position, and forward by being given tokens",
            )
        if num_tokens == self.position:
            return
        self.crop(num_tokens)
        self.in_call = False
        if self.output_ids is not None:
            self.output_ids = self.output_ids[:, :num_tokens] if num_tokens else None
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, :num_tokens] if num_tokens else None

    def record_token_ids(self, ids_BT: torch.Tensor | None, mask_BS: torch.Tensor | None) -> None:
        """These were the tokens of the last step, as far as the caller knows them, and the mask of all."""
        if self.in_call:
            return
        past = self.output_ids
        num_past = 0 if ids_BT is None else self.num_tokens - ids_BT.shape[1]
        if ids_BT is None or (num_past and (past is None or past.shape[1] < num_past or len(past) != len(ids_BT))):
            self.output_ids = self.attention_mask = None
            return
        ids = ids_BT if past is None or not num_past else torch.cat((past[:, :num_past], ids_BT), dim=1)
        if mask_BS is None:
            mask_BS = torch.ones_like(ids)
            if self.attention_mask is not None and num_past:
                mask_BS[:, :num_past] = self.attention_mask[:, :num_past]
        self.output_ids, self.attention_mask = ids, mask_BS

    def expect(self, num_tokens: int) -> None:
        """It will perhaps get so long. That is no promise, and no limit."""
        self._session.expect(min(num_tokens, self.max_length) + self._num_prompt_tokens)

    def defer(
        self, hidden_BTD: torch.Tensor, *, positions_BT: torch.Tensor | None, mask_BT: torch.Tensor | None
    ) -> None:
        """Begin with inputs [B, T, D] whose outputs are known: servers compute them before the next step."""
        self._deferred = _Deferred(hidden_BTD.detach().to("cpu", copy=True).contiguous(), positions_BT, mask_BT)
        self._session.batch_size = hidden_BTD.shape[0]
        self.num_tokens = hidden_BTD.shape[1] - self._num_prompt_tokens

    def step(
        self,
        hidden_BTD: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_call: HeadCall | None = None,
    ) -> torch.Tensor:
        """Append inputs [B, T, D] and return the blocks' outputs for them. Raises `UserError` when it gets too long.

        `attention_mask` is of these tokens or of all, 0 where a token is padding; without one, they are none. Of no
        tokens at all there are no outputs, and nothing is sent. If the output head was `head_call` for logits and has
        answered, what is returned means nothing.
        """
        if not self._closing.alive:
            raise UserError("this session is closed")
        if hidden_BTD.dim() == 3 and hidden_BTD.shape[0] and not hidden_BTD.shape[1]:
            return hidden_BTD.clone()
        check_inputs(hidden_BTD)
        self._catch_up()
        batch_size, num_tokens, _ = hidden_BTD.shape
        position = self.num_tokens and self.num_tokens + self._num_prompt_tokens
        num_tokens -= 0 if position else self._num_prompt_tokens
        if self.num_tokens + num_tokens > self.max_length:
            raise UserError(
                f"{self.num_tokens + num_tokens} tokens in a session of at most {self.max_length}",
                hint="open it with a larger max_length, as far as the model allows (shoal chat: --max-length, or /new)",
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
            None if head_call is None else head_call.logits_request(hidden_BTD),
        )
        output = self._runtime.run(work)
        self.num_tokens += num_tokens
        if isinstance(output, Logits):
            assert head_call is not None
            head_call.answer = output.to(hidden_BTD.device)
            output = hidden_BTD.new_zeros(1, 1, 1).expand_as(hidden_BTD)
        return cast(torch.Tensor, NoGradient.apply(output.to(hidden_BTD.device), hidden_BTD))

    def crop(self, num_tokens: int) -> None:
        """Let the servers forget everything after the first `num_tokens` tokens; they may be given it again."""
        num_inputs = num_tokens and num_tokens + self._num_prompt_tokens
        if self._deferred is not None:
            self._deferred.change(lambda each: each[:, :num_inputs])
            self._deferred = self._deferred if num_inputs else None
        else:
            self._session.crop(num_inputs)
        self.num_tokens = min(self.num_tokens, num_tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        """From now on, sequence i continues the one that was `rows[i]`."""
        if self._deferred is not None:
            self._deferred.change(lambda each: each[list(rows)])
            self._session.batch_size = len(rows)
        else:
            self._session.select_rows(rows)

    def _catch_up(self) -> None:
        """Let the servers compute what was deferred."""
        if (deferred := self._deferred) is None:
            return
        self._runtime.run(self._session.step(deferred.hidden_BTD, 0, deferred.positions_BT, deferred.mask_BT))
        self._deferred = None

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
        enter(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        leave(self)
        self.close()


def _close(runtime: Runtime, session: Session) -> None:
    if session.was_opened:
        runtime.start(session.close())
