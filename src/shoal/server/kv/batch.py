"""One pass over the weights, for the new tokens of many sessions.

Sessions may use different blocks of the server. So a pass goes through the blocks in segments, and through each segment
with the tokens of the sessions that use it.
"""

# B sequences of a session, T new tokens, S all its tokens, P pages of a sequence, D hidden size
# N new tokens of all sessions of a pass

from __future__ import annotations

import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from shoal.model.body import BlockOverrides, Body
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.model.peft.packed_adapters import AdapterRows, with_row_adapters
from shoal.prefix import PAGE_TOKENS
from shoal.server.kv.attention import AttentionBackend, PackedBatch, PackedSequence, attend_with
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.sdpa_attention import SdpaAttention
from shoal.server.kv.session_cache import Growth
from shoal.server.step_inputs import WantedLogits
from shoal.spans import Span

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one session, and where they go in the cache.

    `span` are the session's blocks. `positions_BT` count on from the cache if they are `None`, and no token is padding
    if `mask_BS` is. Before the new tokens, `num_computed_tokens` tokens of each sequence are in the cache; `pages` are
    each sequence's, those for the new tokens included, and `slots` those of their states, if the body keeps states.
    `growth` is what the cache has to do first. `adapters` are by block. If logits are `wanted`, they are the answer.
    """

    span: Span
    hidden_BTD: torch.Tensor
    positions_BT: torch.Tensor | None
    mask_BS: torch.Tensor | None
    num_computed_tokens: int
    pages: tuple[tuple[int, ...], ...]
    growth: Growth
    slots: tuple[int, ...] = ()
    adapters: Mapping[int, BlockAdapter] = field(default_factory=dict)
    wanted: WantedLogits | None = None

    @property
    def new_indices(self) -> torch.Tensor:
        """Where the new tokens are in each sequence, [T]."""
        return torch.arange(self.num_computed_tokens, self.num_computed_tokens + self.hidden_BTD.shape[1])

    @property
    def new_positions(self) -> torch.Tensor:
        """The positions of the new tokens, [B, T]."""
        return self.new_indices.expand(self.hidden_BTD.shape[0], -1) if self.positions_BT is None else self.positions_BT


class Pass(Protocol):
    """How a body computes chunks: together, or one by one."""

    def __call__(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
        """For each chunk its outputs [B, T, D] in the body's dtype, or the exception of that chunk alone.

        Raises `torch.OutOfMemoryError` if the device has no memory for the pass. Then nothing is computed, and the same
        chunks may be computed again. It is called on the compute thread.
        """
        ...


class HalfWritten(Exception):
    """A pass failed while it wrote what it had computed: its sessions have to begin anew."""


class PackedPass:
    """The tokens of all chunks in a row, which only the attention tells apart.

    `attention` works on `cache`; by default it is the reference, `SdpaAttention`.
    """

    def __init__(self, body: Body, cache: PagedCache, attention: AttentionBackend[Any] | None = None) -> None:
        self._body = body
        self._cache = cache
        self._attention: AttentionBackend[Any] = attention or SdpaAttention(cache)

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
        self._cache.prepare([chunk.growth for chunk in chunks])
        return each_alone_if_together_fails(self._compute, chunks)

    def _compute(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        packed = [_PackedChunk(chunk, self._body) for chunk in chunks]
        for segment in segments([chunk.span for chunk in chunks]):
            self._run(segment, [each for each in packed if segment in each.chunk.span])
        for each in packed:
            self._cache.write_outputs(each.slot_mapping_N, each.hidden_ND)
        return [each.hidden_ND.view(chunk.hidden_BTD.shape) for each, chunk in zip(packed, chunks, strict=True)]

    def _run(self, segment: Span, packed: Sequence[_PackedChunk]) -> None:
        """Take chunks through a segment of the blocks."""
        sequences: list[PackedSequence] = []
        start = 0
        for each in packed:
            sequences += each.sequences(start)
            start += len(each.hidden_ND)
        slot_mapping_N = torch.cat([each.slot_mapping_N for each in packed])
        metadata = self._attention.metadata(PackedBatch(tuple(sequences), slot_mapping_N))
        output_ND = self._body.forward_packed(
            torch.cat([each.hidden_ND for each in packed]),
            torch.cat([each.positions_N for each in packed]),
            span=segment,
            attend=functools.partial(attend_with, self._attention, metadata),
            overrides=row_overrides(segment, [(each.chunk, len(each.hidden_ND), 0) for each in packed]),
        )
        for each, hidden_ND in zip(packed, output_ND.split([len(each.hidden_ND) for each in packed]), strict=True):
            each.hidden_ND = hidden_ND


class _PackedChunk:
    """A chunk on its way through the blocks, its sequences one after another."""

    def __init__(self, chunk: Chunk, body: Body) -> None:
        device = body.backbone.device
        index_T = chunk.new_indices
        first_page = chunk.num_computed_tokens // PAGE_TOKENS  # the one with the first new token
        pages_BP = torch.tensor([pages[first_page:] for pages in chunk.pages])
        slots_BT = pages_BP[:, index_T // PAGE_TOKENS - first_page] * PAGE_TOKENS + index_T % PAGE_TOKENS
        self.chunk = chunk
        self.hidden_ND = chunk.hidden_BTD.to(device, body.backbone.dtype).flatten(0, 1)
        self.positions_N = chunk.new_positions.flatten().to(device)
        self.slot_mapping_N = slots_BT.flatten().to(device)

    def sequences(self, start: int) -> list[PackedSequence]:
        """Its sequences in a pass where its tokens begin at `start`."""
        chunk = self.chunk
        num_tokens = chunk.hidden_BTD.shape[1]
        masks = [None] * len(chunk.pages) if chunk.mask_BS is None else list(chunk.mask_BS.bool())
        return [
            PackedSequence(
                pages, chunk.num_computed_tokens, start + row * num_tokens, start + (row + 1) * num_tokens, mask
            )
            for row, (pages, mask) in enumerate(zip(chunk.pages, masks, strict=True))
        ]


def each_alone_if_together_fails(
    compute: Callable[[Sequence[Chunk]], list[torch.Tensor]], chunks: Sequence[Chunk]
) -> list[torch.Tensor | Exception]:
    """The outputs of all chunks. If a pass fails, each chunk is computed alone, so that only the chunk at fault fails.

    A computation that fails must leave the past of its chunks as it was. For want of memory, all fail: what is computed
    then, in smaller passes, is not decided here.
    """
    try:
        return list(compute(chunks))
    except torch.OutOfMemoryError:
        raise
    except HalfWritten as error:
        return [error] * len(chunks)
    except Exception as error:
        if len(chunks) == 1:
            return [error]
        log.exception("a pass over %d sessions failed; the server computes them one by one", len(chunks))
        return [outcome for chunk in chunks for outcome in each_alone_if_together_fails(compute, [chunk])]


def row_overrides(segment: Span, rows_of: Sequence[tuple[Chunk, int, int]]) -> BlockOverrides:
    """What adapters change about the blocks of a segment, if the chunks' tokens are computed in a row.

    Each chunk stands with the number of its rows, and with how many of its new tokens were computed before these.
    """
    parts: dict[int, list[AdapterRows]] = defaultdict(list)
    num_rows = 0
    for chunk, num_own, start in rows_of:
        rows = slice(num_rows, num_rows + num_own)
        num_rows = rows.stop
        for block, adapter in chunk.adapters.items():
            if block in segment:
                position = chunk.num_computed_tokens + start
                parts[block].append(AdapterRows(rows, chunk.hidden_BTD.shape[0], position, adapter))
    return {block: functools.partial(with_row_adapters, parts=some, num_rows=num_rows) for block, some in parts.items()}


def segments(spans: Sequence[Span]) -> list[Span]:
    """The longest runs of blocks that the same sessions use, in order. Blocks that no session uses are left out."""
    bounds = sorted({bound for span in spans for bound in (span.start, span.end)})
    pieces = [Span(start, end) for start, end in itertools.pairwise(bounds)]
    return [piece for piece in pieces if any(piece in span for span in spans)]
