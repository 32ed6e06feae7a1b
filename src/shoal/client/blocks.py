"""The model's blocks as a module, wherever they run: called, sliced, differentiated, or stepped through."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from shoal.client.chain import Chain
from shoal.client.logits import Asked, Logits
from shoal.client.passes import Gradients, Passes, Piece, Plan
from shoal.client.runtime import Runtime
from shoal.client.session import Session
from shoal.errors import UnsupportedOperation, UserError
from shoal.model.adapters import Tuned, Tuning, tuned_block, unmeasured
from shoal.model.head import HeadCache
from shoal.model.prompts import PROMPT
from shoal.protocol import MAX_BATCH, MAX_LENGTH
from shoal.routing.route import Hop
from shoal.spans import Span


class RemoteBlocks(nn.Module):
    """The blocks of a span, served by others. Slices like a list: `blocks[3:6]`."""

    def __init__(
        self,
        runtime: Runtime,
        chain: Chain,
        span: Span,
        *,
        max_length: int,
        passes: Passes | None = None,
        skeletons: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.span = span
        self.max_length = max_length
        self.num_prompt_tokens = 0
        """Before the tokens of a sequence come so many that its callers do not count: those of a soft prompt."""
        self.hosted: str | None = None
        """The name of the adapter that these blocks have, if servers may host it."""
        self._runtime = runtime
        self._chain = chain
        self._passes = passes or _passes_of(runtime, chain)
        self.mount(skeletons)

    def mount(self, skeletons: Sequence[nn.Module]) -> None:
        """Let these stand for the blocks, wherever somebody looks for their layers: PEFT puts its own around them."""
        for block, skeleton in zip(self.span, skeletons, strict=False):
            self.add_module(str(block), skeleton)

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int | slice) -> RemoteBlocks:
        """Some of the blocks, counted from this span's first. Steps other than 1 are refused."""
        blocks = range(self.span.start, self.span.end)[index]
        if isinstance(blocks, int):
            blocks = range(blocks, blocks + 1)
        if blocks.step != 1 or not blocks:
            raise UserError(f"blocks run in order, and at least one of them: not {index}")
        return self._like(Span(blocks.start, blocks.stop), dict(self.named_children()))

    def _like(self, span: Span, skeletons: Mapping[str, nn.Module]) -> RemoteBlocks:
        blocks = RemoteBlocks(
            self._runtime,
            self._chain,
            span,
            max_length=self.max_length,
            passes=self._passes,
            skeletons=[skeletons[str(block)] for block in span if str(block) in skeletons],
        )
        blocks.hosted = self.hosted
        return blocks

    def __iter__(self) -> Iterator[RemoteBlocks]:
        return (self[index] for index in range(len(self)))

    def extra_repr(self) -> str:
        return f"{self.span} of {self._chain.model.name}, in the swarm"

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HeadCache | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D] after the blocks.

        `attention_mask` [B, S] is 0 where a token is padding; `position_ids` are [B, T]. With `past_key_values` the
        tokens are appended to its session; without, the call is differentiable with respect to the hidden states.
        """
        if past_key_values is not None:
            session = cast(InferenceSession, past_key_values.session)
            return session.step(
                hidden_BTD, attention_mask=attention_mask, position_ids=position_ids, asked=past_key_values.asked
            )
        _check_inputs(hidden_BTD)
        mask = _mask_of(attention_mask, hidden_BTD)
        positions = _positions_of(position_ids, hidden_BTD)
        tuned = self._tuned()
        parameters = [parameter for each in tuned for parameter in each.parameters]
        work = _Work(self._runtime, self._passes, self._plan(tuned, hidden_BTD), tuned, positions, mask)
        return cast(torch.Tensor, _Passes.apply(hidden_BTD, work, *parameters))

    def _tuned(self) -> list[Tuned]:
        """What the caller has added to the blocks, as it is now."""
        self._measure()
        found = (
            tuned_block(int(name), skeleton, getattr(skeleton, PROMPT, None))
            for name, skeleton in self.named_children()
        )
        return [each for each in found if each is not None]

    def _measure(self) -> None:
        """Find the magnitudes with which DoRA begins: those of the weights, which servers hold."""
        for name, skeleton in self.named_children():
            if new := unmeasured(skeleton):
                sizes = [len(magnitudes) for magnitudes in new.values()]
                norms = self._runtime.run(self._passes.norms(int(name), list(new), sum(sizes)))
                with torch.no_grad():
                    for magnitudes, found in zip(new.values(), norms.split(sizes), strict=True):
                        magnitudes.copy_(found)

    def _plan(self, tuned: Sequence[Tuned], hidden_BTD: torch.Tensor) -> Plan:
        tuning = Tuning({each.block: each.factors(hosted=self.hosted) for each in tuned})
        trainable = [each.block for each in tuned if any(own.requires_grad for own in each.parameters)]
        inputs_wanted = hidden_BTD.requires_grad and torch.is_grad_enabled()
        wanted = [self.span.start] * inputs_wanted + trainable * torch.is_grad_enabled()
        return Plan(
            self.span,
            tuning,
            inputs_wanted=inputs_wanted,
            wanted_from=min(wanted, default=None),
            seed=int(torch.randint(1 << 32, ())) << 20 if tuning.drops else None,
        )

    def inference_session(self, *, max_length: int | None = None, batch_size: int = 1) -> InferenceSession:
        """A session on these blocks, for up to `max_length` tokens; use it as a context manager.

        What has been added to the blocks stays, in this session, as it is now.
        """
        return InferenceSession(
            self._runtime,
            self._chain,
            self.span,
            batch_size=batch_size,
            max_length=max_length or self.max_length,
            num_prompt_tokens=self.num_prompt_tokens,
            tuning=Tuning({each.block: each.factors(hosted=self.hosted) for each in self._tuned()}),
        )

    def new_session(self, *, batch_size: int, max_length: int) -> InferenceSession:
        """The session of one `generate()`."""
        session = self.inference_session(batch_size=batch_size, max_length=max_length)
        if (opened := _opened.get()) is not None:
            opened.append(session)
        return session

    def close(self) -> None:
        """Leave the swarm, with all that belongs to this model. May be called twice."""
        self._runtime.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteBlocks:
        return self._like(self.span, {name: copy.deepcopy(child, memo) for name, child in self.named_children()})


def _passes_of(runtime: Runtime, chain: Chain) -> Passes:
    """Single passes, until the network is closed."""
    passes = Passes(chain)
    runtime.resources.push_async_callback(passes.close)
    return passes


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

        If the output head was `asked` for logits and has answered, what is returned means nothing.
        """
        if not self._closing.alive:
            raise UserError("this session is closed")
        _check_inputs(hidden_BTD)
        batch_size, num_tokens, _ = hidden_BTD.shape
        position = self.num_tokens and self.num_tokens + self._num_prompt_tokens
        num_tokens -= 0 if position else self._num_prompt_tokens
        if self.num_tokens + num_tokens > self.max_length:
            raise UserError(
                f"{self.num_tokens + num_tokens} tokens in a session of at most {self.max_length}",
                hint="open it with a larger max_length",
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
            _positions_of(position_ids, hidden_BTD),
            _mask_of(attention_mask, hidden_BTD),
            None if asked is None else asked.question(hidden_BTD),
        )
        output = self._runtime.run(work)
        self.num_tokens += num_tokens
        if isinstance(output, Logits):
            assert asked is not None
            asked.answer = output.to(hidden_BTD.device)
            output = hidden_BTD.new_zeros(1, 1, 1).expand_as(hidden_BTD)
        return cast(torch.Tensor, _NoGradient.apply(output.to(hidden_BTD.device), hidden_BTD))

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


@dataclass(frozen=True)
class _Work:
    """A forward pass: what is to be computed, and with what of the caller's."""

    runtime: Runtime
    passes: Passes
    plan: Plan
    tuned: Sequence[Tuned]
    positions: torch.Tensor | None
    mask: torch.Tensor | None


class _Passes(torch.autograd.Function):
    """A forward pass through the swarm whose backward pass goes through it too."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: torch.Tensor, work: _Work, *parameters: torch.Tensor) -> torch.Tensor:
        output, pieces = work.runtime.run(
            work.passes.forward(work.plan, _on_cpu(hidden_BTD), work.positions, work.mask)
        )
        ctx.work, ctx.pieces = work, pieces
        ctx.save_for_backward(hidden_BTD, *parameters)  # the pieces may share the memory of the former
        return output.to(hidden_BTD.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if any has been changed since
        (grad,) = grads
        work: _Work = ctx.work
        pieces: list[list[Piece]] = ctx.pieces
        found: Gradients = work.runtime.run(work.passes.backward(work.plan, pieces, _on_cpu(grad)))
        inputs = None if found.inputs_BTD is None else found.inputs_BTD.to(grad.device)
        factors = [
            gradient
            for each in work.tuned
            for gradient in (
                each.gradients(found.factors[each.block])
                if each.block in found.factors
                else [None] * len(each.parameters)
            )
        ]
        return inputs, None, *factors


class _NoGradient(torch.autograd.Function):
    """Marks what came out of a session: servers keep a cache there and nothing to differentiate."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise UnsupportedOperation(
            "gradients do not flow through an inference session", hint="call the model with use_cache=False"
        )


def _check_inputs(hidden_BTD: torch.Tensor) -> None:
    if hidden_BTD.dim() != 3 or not hidden_BTD.numel():
        raise UserError(
            f"inputs of shape {list(hidden_BTD.shape)}", hint="blocks take [batch, tokens, hidden size], none of them 0"
        )


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _mask_of(attention_mask: torch.Tensor | None, hidden_BTD: torch.Tensor) -> torch.Tensor | None:
    """The new tokens' part of a mask, [B, T] uint8."""
    if attention_mask is None:
        return None
    batch_size, num_tokens, _ = hidden_BTD.shape
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < num_tokens:
        raise UserError(
            f"an attention mask of shape {list(attention_mask.shape)} for {batch_size} by {num_tokens} tokens"
        )
    return (attention_mask[:, -num_tokens:] != 0).to("cpu", torch.uint8)


def _positions_of(position_ids: torch.Tensor | None, hidden_BTD: torch.Tensor) -> torch.Tensor | None:
    """Positions as they travel, [B, T] int64."""
    if position_ids is None:
        return None
    if position_ids.dim() != 2 or position_ids.shape[1] != hidden_BTD.shape[1]:
        raise UnsupportedOperation("only position_ids of shape [batch, tokens] can be sent to servers")
    return position_ids.expand(hidden_BTD.shape[0], -1).to("cpu", torch.int64, copy=True)
