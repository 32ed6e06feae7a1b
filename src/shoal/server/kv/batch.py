"""One pass over the weights, for the tokens of many sessions.

Sessions may use different blocks of the server: a pass goes through the blocks in segments, and in each of them through
those sessions' tokens that are due there.
"""

# B sequences of a session, T new tokens, S all its tokens, N packed tokens of all sessions, D hidden size

from __future__ import annotations

import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from shoal.model.body import BlockOverrides, Body
from shoal.model.body_cache import BodyCache
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.model.peft.packed_adapters import AdapterRows, with_row_adapters
from shoal.prefix import PAGE_TOKENS
from shoal.server.kv.packed_attention import NewTokens, PackedAttention
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.session_cache import Growth
from shoal.server.step_inputs import WantedLogits
from shoal.spans import Span

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one session, and where they go."""

    span: Span
    hidden_BTD: torch.Tensor
    positions_BT: torch.Tensor | None
    mask_BS: torch.Tensor | None
    num_cached: int
    pages: tuple[tuple[int, ...], ...]
    growth: Growth
    cache: BodyCache | None
    adapters: Mapping[int, BlockAdapter] = field(default_factory=dict)
    wanted: WantedLogits | None = None  # logits instead of hidden states


class Pass(Protocol):
    """How a body computes chunks: together, or one by one."""

    def __call__(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
        """Outputs [B, T, D] for each chunk, as precise as the body, or why there are none.

        One chunk's failure is not another's. To be called on the compute thread.
        """
        ...


class SequentialPass:
    """For families that keep more than keys and values, or have an attention of their own: Transformers' caches."""

    def __init__(self, body: Body) -> None:
        self._body = body

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
        return [self._outcome(chunk) for chunk in chunks]

    def _outcome(self, chunk: Chunk) -> torch.Tensor | Exception:
        try:
            return self._compute(chunk)
        except Exception as error:
            return error

    def _compute(self, chunk: Chunk) -> torch.Tensor:
        device, dtype = self._body.backbone.device, self._body.backbone.dtype
        output_BTD: torch.Tensor = self._body(
            chunk.hidden_BTD.to(device, dtype),
            span=chunk.span,
            attention_mask=None if chunk.mask_BS is None else chunk.mask_BS.to(device),
            position_ids=None if chunk.positions_BT is None else chunk.positions_BT.to(device),
            cache=chunk.cache,
            overrides={block: adapter.on for block, adapter in chunk.adapters.items()},
        )
        return output_BTD


class PackedPass:
    """All tokens in a row, whosever they are; only attention tells them apart."""

    def __init__(self, body: Body, cache: PagedCache) -> None:
        self._body = body
        self._cache = cache

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
        self._cache.prepare([chunk.growth for chunk in chunks])
        return self._outcomes(chunks)

    def _outcomes(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
        """If a pass fails, each chunk is tried alone: only who is to blame shall notice."""
        try:
            return list(self._compute(chunks))
        except Exception as error:
            if len(chunks) == 1:
                return [error]
            log.exception("a pass over %d sessions failed: trying them one by one", len(chunks))
            return [outcome for chunk in chunks for outcome in self._outcomes([chunk])]

    def _compute(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        tokens = [_Tokens(chunk, self._body) for chunk in chunks]
        for segment in segments([chunk.span for chunk in chunks]):
            self._run(segment, [each for each in tokens if segment in each.span])
        for each in tokens:
            self._cache.keep_outputs(each.slots, each.hidden_ND)
        return [each.hidden_ND.view(chunk.hidden_BTD.shape) for each, chunk in zip(tokens, chunks, strict=True)]

    def _run(self, segment: Span, tokens: Sequence[_Tokens]) -> None:
        sequences: list[NewTokens] = []
        start = 0
        for each in tokens:
            sequences += each.sequences(start)
            start += len(each.hidden_ND)
        hidden_ND = torch.cat([each.hidden_ND for each in tokens])
        positions_N = torch.cat([each.positions for each in tokens])
        attend = PackedAttention(self._cache, sequences, torch.cat([each.slots for each in tokens]))
        output_ND = self._body.forward_packed(
            hidden_ND, positions_N, span=segment, attend=attend, overrides=_overrides(segment, tokens)
        )
        for each, hidden in zip(tokens, output_ND.split([len(each.hidden_ND) for each in tokens]), strict=True):
            each.hidden_ND = hidden


class _Tokens:
    """A chunk on its way through the blocks, its sequences one after another."""

    def __init__(self, chunk: Chunk, body: Body) -> None:
        device = body.backbone.device
        batch_size, num_tokens, _ = chunk.hidden_BTD.shape
        self.span = chunk.span
        self.hidden_ND = chunk.hidden_BTD.to(device, body.backbone.dtype).flatten(0, 1)
        index_T = torch.arange(chunk.num_cached, chunk.num_cached + num_tokens)
        positions_BT = index_T.expand(batch_size, -1) if chunk.positions_BT is None else chunk.positions_BT
        self.positions = positions_BT.flatten().to(device)
        first = chunk.num_cached // PAGE_TOKENS
        pages_BP = torch.tensor([pages[first:] for pages in chunk.pages])
        slots_BT = pages_BP[:, index_T // PAGE_TOKENS - first] * PAGE_TOKENS + index_T % PAGE_TOKENS
        self.slots = slots_BT.flatten().to(device)
        self.adapters = chunk.adapters
        self.num_cached = chunk.num_cached
        self.num_sequences = batch_size
        self._chunk = chunk

    def sequences(self, start: int) -> list[NewTokens]:
        """Its sequences in a pack where they begin at `start`."""
        chunk = self._chunk
        num_tokens = chunk.hidden_BTD.shape[1]
        masks = [None] * len(chunk.pages) if chunk.mask_BS is None else list(chunk.mask_BS.bool())
        return [
            NewTokens(pages, chunk.num_cached, start + row * num_tokens, start + (row + 1) * num_tokens, mask)
            for row, (pages, mask) in enumerate(zip(chunk.pages, masks, strict=True))
        ]


def _overrides(segment: Span, tokens: Sequence[_Tokens]) -> BlockOverrides:
    """What the adapters of those whose tokens are in a pack change about its blocks."""
    parts: dict[int, list[AdapterRows]] = defaultdict(list)
    num_rows = 0
    for each in tokens:
        rows = slice(num_rows, num_rows + len(each.hidden_ND))
        num_rows = rows.stop
        for block, adapter in each.adapters.items():
            if block in segment:
                parts[block].append(AdapterRows(rows, each.num_sequences, each.num_cached, adapter))
    return {block: functools.partial(with_row_adapters, parts=some, num_rows=num_rows) for block, some in parts.items()}


def segments(spans: Sequence[Span]) -> list[Span]:
    """The runs of blocks through which the same sessions go, in order; blocks that nobody uses are left out."""
    bounds = sorted({bound for span in spans for bound in (span.start, span.end)})
    pieces = [Span(start, end) for start, end in itertools.pairwise(bounds)]
    return [piece for piece in pieces if any(piece in span for span in spans)]
