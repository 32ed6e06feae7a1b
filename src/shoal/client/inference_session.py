"""A session as the user sees it: a cache on the servers, for any number of calls."""

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
from shoal.client.decoding.session_inputs import StepInputs
from shoal.client.decoding.state import SessionState
from shoal.client.head.logits import HeadCall, Logits, LogitsRequest
from shoal.client.runtime import Runtime
from shoal.client.swarm.swarm import Swarm
from shoal.client.training.autograd import NoGradient
from shoal.errors import UserError
from shoal.events import TextDoubtful
from shoal.model.peft.factors import ActiveAdapters
from shoal.policy.routing.route import Hop
from shoal.protocol import MAX_BATCH, MAX_LENGTH
from shoal.spans import Span

LARGER = "open it with a larger max_length, if the model allows it (shoal chat: --max-length, or /new)"

_opened: ContextVar[list[InferenceSession] | None] = ContextVar("_opened", default=None)


@contextlib.contextmanager
def closing_new_sessions() -> Iterator[list[InferenceSession]]:
    """Collect the sessions that `new_session` opens in the context; at its end, those still in the list are closed.

    Transformers opens the cache of a `generate()` deep inside, where a traceback would keep it alive.
    """
    opened: list[InferenceSession] = []
    token = _opened.set(opened)
    try:
        yield opened
    finally:
        _opened.reset(token)
        for session in opened:
            session.abandon()
        opened.clear()  # a task that outlives the context has a copy of it


def note_opened(session: InferenceSession) -> None:
    """Add a session to the list of the enclosing `closing_new_sessions`, if there is one."""
    if (opened := _opened.get()) is not None:
        opened.append(session)


@dataclass
class _Deferred:
    """Inputs whose outputs are known already. Servers compute them only when others follow."""

    hidden_BTD: torch.Tensor
    positions_BT: torch.Tensor | None
    mask_BT: torch.Tensor | None

    def change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a function to all tensors."""
        self.hidden_BTD = change(self.hidden_BTD)
        self.positions_BT = None if self.positions_BT is None else change(self.positions_BT)
        self.mask_BT = None if self.mask_BT is None else change(self.mask_BT)


class InferenceSession:
    """A cache on the servers, for one batch of sequences and any number of calls.

    Inside `with model.inference_session() as session:`, calls of `model.generate()` and of the model continue it.
    Elsewhere, pass it to `model.generate(..., session=session)`, or call `step` yourself. It survives the loss of
    servers. One thread at a time may use it.

    Lengths are in tokens: the session may reach `max_length`, and its servers have room for `expected_length`, by
    default for all of it. `owner` identifies the blocks whose active session it may be. Servers share cached beginnings
    among sessions of the same `salt`, by default the model's. Raises `UserError` for a length or a `batch_size` beyond
    the protocol's limits.
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
        salt: str | None = None,
    ) -> None:
        if not (1 <= batch_size <= MAX_BATCH and 1 <= max_length <= MAX_LENGTH):
            raise UserError(
                f"a session cannot have {batch_size} sequences of {max_length} tokens",
                hint=f"it may have 1 to {MAX_BATCH} sequences of 1 to {MAX_LENGTH} tokens",
            )
        self.max_length = max_length
        self.owner = owner
        self.num_tokens = 0
        self.output_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        self.in_call = False
        """Whether a call of `generate()` or a stream keeps account of the tokens."""
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
            salt=salt,
        )
        runtime.sessions.add(self._session)
        self._closing = weakref.finalize(self, _close, runtime, self._session)
        self._closing.atexit = False  # at exit, the runtime closes all sessions

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return self._session.batch_size

    @property
    def doubtful(self) -> tuple[TextDoubtful, ...]:
        """The tokens that were chosen from outputs of servers which turned out not to be trusted (docs/trust.md)."""
        return self._session.doubtful

    @property
    def num_audited(self) -> int:
        """How many of its first tokens other servers have computed again, with the same results (docs/trust.md)."""
        return self._session.num_audited

    @property
    def servers(self) -> tuple[str, ...]:
        """The peer ids of the servers that hold it now, in the order of their blocks."""
        return tuple(hop.server.peer for hop in self.hops)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The same servers with what each announces and which blocks it computes for this session."""
        return self._session.hops

    @property
    def num_cached(self) -> int:
        """How many of its first tokens all servers had in their caches when it was opened."""
        return max(0, (self._session.num_cached or 0) - self._num_prompt_tokens)

    def room_after(self, num_tokens: int) -> int:
        """How many tokens a text of `num_tokens` may get in addition. The last one of a text is not read."""
        return max(0, self.max_length + 1 - num_tokens)

    @property
    def state(self) -> SessionState:
        """How far each server has come, and which are kept warm, at this moment."""
        return self._session.state

    @property
    def is_closed(self) -> bool:
        """Whether it was closed: it takes no more calls."""
        return not self._closing.alive

    @property
    def position(self) -> int:
        """How many tokens it has read. Set it to go back: the session then forgets all later tokens.

        Setting it raises `UserError` for a position beyond the present one.
        """
        if self.output_ids is None:
            return 0 if self.in_call else self.num_tokens
        num_told = self.output_ids.shape[1] - 1  # the next call reads the last token of a text
        return num_told if self.in_call else max(num_told, self.num_tokens)

    @position.setter
    def position(self, num_tokens: int) -> None:
        if not 0 <= num_tokens <= self.position:
            raise UserError(
                f"a session that has read {self.position} tokens has no position {num_tokens}",
                hint="set the position to go back; pass tokens to go forward",
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
        """Record the tokens [B, T] of the last step, or `None` where they are not known, and the mask [B, S] of all."""
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
        """Let servers that are chosen from now on have room for this many tokens. It is not a limit."""
        self._session.expect(min(num_tokens, self.max_length) + self._num_prompt_tokens)

    def defer(
        self, hidden_BTD: torch.Tensor, *, positions_BT: torch.Tensor | None, mask_BT: torch.Tensor | None
    ) -> None:
        """Begin with inputs [B, T, D] whose outputs are known. Servers compute them before the next step."""
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
        """Append inputs [B, T, D]; returns the blocks' outputs for them, [B, T, D].

        `attention_mask` is that of these tokens [B, T] or of all tokens [B, S], 0 where a token is padding; by default
        none is. `position_ids` are [B, T]. With T = 0 nothing is sent. If a server answered the `head_call`, the answer
        is there, and the returned tensor has no meaning.

        Raises `UserError` when the session is closed or would get longer than `max_length`, `MissingBlocks` when no
        server can take the place of a lost one, and `SwarmError` if the swarm cannot be asked.
        """
        self._check_open()
        if hidden_BTD.dim() == 3 and hidden_BTD.shape[0] and not hidden_BTD.shape[1]:
            return hidden_BTD.clone()
        check_inputs(hidden_BTD)
        own_BTD = (
            hidden_BTD.detach().to("cpu", copy=True).contiguous()
        )  # kept for a replay; the caller may reuse its own
        output = self._runtime.run(
            self.step_on_loop(
                own_BTD,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_request=None if head_call is None else head_call.logits_request(hidden_BTD),
            )
        )
        if isinstance(output, Logits):
            assert head_call is not None
            head_call.answer = output.to(hidden_BTD.device)
            output = hidden_BTD.new_zeros(1, 1, 1).expand_as(hidden_BTD)
        return cast(torch.Tensor, NoGradient.apply(output.to(hidden_BTD.device), hidden_BTD))

    async def step_on_loop(
        self,
        hidden_BTD: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        logits_request: LogitsRequest | None = None,
        ahead: Sequence[StepInputs] = (),
    ) -> torch.Tensor | Logits:
        """The same for callers on the client's event loop, who leave the inputs, on the CPU, to the session.

        Returns logits instead if a server answered the `logits_request`. The steps `ahead` are sent behind this one
        and may follow it; `Session.step` says how.
        """
        self._check_open()
        await self._catch_up()
        batch_size, num_tokens, _ = hidden_BTD.shape
        position = self.num_tokens and self.num_tokens + self._num_prompt_tokens
        num_tokens -= 0 if position else self._num_prompt_tokens
        if self.num_tokens + num_tokens > self.max_length:
            raise UserError(
                f"{self.num_tokens + num_tokens} tokens in a session of at most {self.max_length}",
                hint=LARGER,
            )
        if self.num_tokens == 0:
            self._session.batch_size = batch_size
        elif batch_size % self.batch_size == 0:
            self._spread(batch_size // self.batch_size)
        else:
            raise UserError(f"{batch_size} sequences in a session of {self.batch_size}")
        output = await self._session.step(
            hidden_BTD,
            position,
            positions_of(position_ids, hidden_BTD),
            mask_of(attention_mask, hidden_BTD, num_past=position),
            logits_request,
            ahead=ahead,
        )
        self.num_tokens += num_tokens
        return output

    def _check_open(self) -> None:
        if not self._closing.alive:
            raise UserError("this session is closed")

    def crop(self, num_tokens: int) -> None:
        """Forget everything after the first `num_tokens` tokens. Other tokens may follow them then."""
        num_inputs = num_tokens and num_tokens + self._num_prompt_tokens
        if self._deferred is not None:
            self._deferred.change(lambda each: each[:, :num_inputs])
            self._deferred = self._deferred if num_inputs else None
        else:
            self._session.crop(num_inputs)
        self.num_tokens = min(self.num_tokens, num_tokens)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Rearrange the batch: from now on, sequence i continues the former sequence `rows[i]`."""
        if self._deferred is not None:
            self._deferred.change(lambda each: each[list(rows)])
            self._session.batch_size = len(rows)
        else:
            self._session.select_rows(rows)

    async def _catch_up(self) -> None:
        """Let the servers compute the deferred inputs."""
        if (deferred := self._deferred) is None:
            return
        await self._session.step(deferred.hidden_BTD, 0, deferred.positions_BT, deferred.mask_BT)
        self._deferred = None

    def _spread(self, num_each: int) -> None:
        """Repeat each sequence: beams and samples begin like this."""
        if num_each > 1:
            self.select_rows([row for row in range(self.batch_size) for _ in range(num_each)])

    def close(self) -> None:
        """End the session: its servers free their caches. May be called twice."""
        if self._closing.detach() is not None and self._runtime.usable:
            self._runtime.run(self._session.close())

    def abandon(self) -> None:
        """Close it without waiting for the servers."""
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
