"""An engine without a network, and visitors of it, who keep their inputs as clients do."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.adapters import adapter_cache_salt
from shoal.model.body import Body, build_body
from shoal.model.families import family_of, text_config
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.model.peft.factors import ActiveAdapters, AdapterFactors
from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_times import PassTimeModel
from shoal.prefix import DIGEST_BYTES, page_hashes, root_hash
from shoal.protocol import Adapter, Open, Step
from shoal.server.engine.engine import Engine
from shoal.server.engine.validator import RequestValidator
from shoal.server.executor import Executor
from shoal.server.kv.batched_pass import pass_over
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.kv.paged_cache import PagedCache, Pages
from shoal.server.kv.session_cache import SessionCache
from shoal.server.refusals import Refused
from shoal.server.step_inputs import StepInputs
from shoal.server.training.adapter_store import MissingFromCache
from shoal.spans import Span

from .parity import assert_equal
from .tiny_models import NUM_BLOCKS, tiny_config, tiny_model

MOST_TOKENS = 64
NARROWEST_WINDOW = 4
PATIENT = Limits(queue_seconds=600.0)
QUICK = PassTimeModel.measured(decode_seconds=1e-3, prefill_token_seconds=1e-4)


@functools.lru_cache(maxsize=8)
def tiny_body(model_type: str, **changes: Any) -> Body:
    """All blocks of a tiny random model, in float32."""
    config = tiny_config(model_type, **changes)
    model = tiny_model(config)
    family = family_of(config, allow_uncertified=True)
    return build_body(family, config, Span(0, NUM_BLOCKS), model.state_dict(), dtype=torch.float32)


def random_inputs(seed: int, body: Body, batch_size: int, num_tokens: int) -> Tensor:
    hidden_size = text_config(body.backbone.config).hidden_size
    return 0.5 * torch.randn(batch_size, num_tokens, hidden_size, generator=torch.Generator().manual_seed(seed))


@contextlib.asynccontextmanager
async def engine_of(
    body: Body,
    *,
    num_pages: int,
    limits: Limits = PATIENT,
    pass_time: PassTimeModel = QUICK,
    kind: type[Pages] = Pages,
) -> AsyncIterator[Engine]:
    """An engine that runs; when it is left, nobody is there any more, and every page is accounted for."""
    hidden_size = text_config(body.backbone.config).hidden_size
    executor = Executor()
    shapes = cache_shapes(body)
    num_pages *= 1 + PagedCache(body, shapes, 1, kind=kind).state_pages
    cache = PagedCache(body, shapes, num_pages, kind=kind)
    engine = Engine(
        body,
        executor,
        RequestValidator(model="", fingerprint="", span=body.span, hidden_size=hidden_size, max_length=MOST_TOKENS),
        compute=pass_over(body, cache),
        cache=cache,
        num_pages=num_pages,
        cpu_turns=None,
        pass_time=pass_time,
        limits=limits,
    )
    try:
        async with engine.running():
            yield engine
        engine.check_integrity()
        assert engine.cache_tokens_left == engine.cache_tokens
    finally:
        executor.close()


class Visitor:
    """A session, and what is needed to begin it again: all its inputs."""

    def __init__(
        self,
        engine: Engine,
        body: Body,
        *,
        span: Span | None = None,
        salt: str = "",
        peer: str = "visitor",
        tuning: ActiveAdapters | None = None,
    ) -> None:
        self.span = span or body.span
        self.salt = salt
        self.peer = peer
        self.tuning = tuning or ActiveAdapters()
        self.num_replays = 0
        self.num_known = 0
        self.session: SessionCache | None = None
        self.inputs_BSD = random_inputs(0, body, 1, 0)
        self.outputs_BSD = self.inputs_BSD
        self.mask_BS = torch.ones(1, 0, dtype=torch.uint8)
        self._engine = engine
        self._body = body
        self._branches: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def num_tokens(self) -> int:
        return self.inputs_BSD.shape[1]

    async def step(
        self,
        hidden_BTD: Tensor,
        *,
        position: int | None = None,
        rows: Sequence[int] | None = None,
        mask_BT: Tensor | None = None,
    ) -> Tensor:
        """More inputs, after going back to `position`; the outputs for them. Begins anew if the session is lost."""
        position = self.num_tokens if position is None else position
        self._branch(position, rows, hidden_BTD.shape[0])
        mask_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.uint8) if mask_BT is None else mask_BT
        self.inputs_BSD = torch.cat((self.inputs_BSD, hidden_BTD), dim=1)
        self.mask_BS = torch.cat((self.mask_BS, mask_BT), dim=1)
        start = position
        while True:
            try:
                if self.session is None:
                    start, rows = await self._opened(), None
                if start < self.num_tokens:
                    rearranged = None if rows is None else tuple(rows)
                    answer = await self._engine.step(
                        self.session, Step(position=start), self._inputs(start), rows=rearranged
                    )
                    self.outputs_BSD = torch.cat((self.outputs_BSD[:, :start], answer["hidden"]), dim=1)
                return self.outputs_BSD[:, position:]
            except Refused as refused:
                if refused.failure.code not in ("busy", "rewind"):
                    raise
                self.num_replays += 1
                self.leave()

    def _branch(self, position: int, rows: Sequence[int] | None, batch_size: int) -> None:
        """What was computed so far is kept to be checked, if a part of it is left behind."""
        if rows is None and position == self.num_tokens > 0:
            return
        self._branches.append((self.inputs_BSD, self.mask_BS, self.outputs_BSD))
        rows = list(range(self.inputs_BSD.shape[0]) if rows is None else rows)
        if position == 0:
            rows = [0] * batch_size
        self.inputs_BSD = self.inputs_BSD[rows, :position]
        self.outputs_BSD = self.outputs_BSD[rows, :position]
        self.mask_BS = self.mask_BS[rows, :position]

    async def _opened(self) -> int:
        """The same as `_open`, after sending the engine the adapters that it lacks, if any."""
        try:
            return self._open()
        except MissingFromCache as lacks:
            for each in self.tuning.in_span(self.span):
                if each.name in lacks.adapters:
                    message = Adapter(block=each.block, layers=each.layers)
                    await self._engine.adapters.store(self.peer, message, {"factors": each.values})
            return self._open()

    def _open(self) -> int:
        """A new session, which is offered the names of all that is known; returns how much of that it has."""
        batch_size = self.inputs_BSD.shape[0]
        request = Open(
            model="",
            fingerprint="",
            start=self.span.start,
            end=self.span.end,
            adapters=self.tuning.names(self.span),
            salt=self.salt,
            batch_size=batch_size,
            expected_length=MOST_TOKENS,
        )
        names = self.names()
        digests = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8) if names[0] else None
        tensors = {} if digests is None else {"digests": digests.view(batch_size, -1, DIGEST_BYTES)}
        self.session, known = self._engine.open(self.peer, request, tensors)
        self.num_known = self.session.num_tokens
        if known is not None:
            self.outputs_BSD = known
        return self.num_known

    def names(self) -> list[bytes]:
        """Those of the full pages of each sequence, one after another; none of padded sequences."""
        if not self.mask_BS.all():
            return [b""] * len(self.inputs_BSD)
        first = root_hash(self.span, adapter_cache_salt(self.salt, self.tuning.names(self.span)))
        positions = torch.arange(self.num_tokens)
        return [b"".join(page_hashes(first, hidden, positions)) for hidden in self.inputs_BSD]

    def _inputs(self, start: int) -> StepInputs:
        tensors: dict[Any, Tensor] = {"hidden": self.inputs_BSD[:, start:]}
        if not self.mask_BS.all():
            tensors |= {"mask": self.mask_BS[:, start:], "positions": _positions(self.mask_BS)[:, start:]}
        return self._engine.validator.step_inputs(tensors)

    def leave(self) -> None:
        """Close the session. May be called twice."""
        if self.session is not None:
            self._engine.close(self.session)
            self.session = None

    @torch.inference_mode()
    def check(self) -> None:
        """Whatever was computed is what the blocks give for the same inputs at once, alone, and without a cache.

        To be called when the engine is idle: it is the same blocks.
        """
        changes = {each.block: self._adapter(each).on for each in self.tuning.in_span(self.span)}
        for inputs_BSD, mask_BS, outputs_BSD in (*self._branches, (self.inputs_BSD, self.mask_BS, self.outputs_BSD)):
            if not inputs_BSD.shape[1]:
                continue
            padded = not mask_BS.all()
            expected_BSD = self._body(
                inputs_BSD,
                span=self.span,
                attention_mask=mask_BS.long() if padded else None,
                position_ids=_positions(mask_BS) if padded else None,
                overrides=changes,
            )
            defined_BS = sees_text(mask_BS)
            assert_equal(outputs_BSD[defined_BS], expected_BSD[defined_BS])
            assert outputs_BSD.isfinite().all()

    def _adapter(self, factors: AdapterFactors) -> BlockAdapter:
        """An own copy."""
        block, hidden_size = self._body.block(factors.block), self.inputs_BSD.shape[-1]
        return BlockAdapter(block, factors.layers, factors.values, name=factors.name, hidden_size=hidden_size)


def sees_text(mask_BS: Tensor) -> Tensor:
    """Which tokens see a token of the text even through the narrowest window of the tiny models.

    Padding is computed too: it sees what is before it. What sees nothing is computed as it happens.
    """
    ends = mask_BS.long().cumsum(dim=1)
    return ends > torch.nn.functional.pad(ends, (NARROWEST_WINDOW, 0))[:, : ends.shape[1]]


def _positions(mask_BS: Tensor) -> Tensor:
    return (mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)
