"""A pass for families whose attention is their own, or whose blocks keep states: in batches, as Transformers has it.

The next tokens of all sessions that decode are one batch [G, 1, D]. Prompts are computed one after another.
"""

# B sequences of a session, G of a batch, T new tokens, S all tokens, D hidden size, N new tokens of a batch

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.model.body import Body
from shoal.model.families import Family
from shoal.policy.batching.length_groups import length_groups
from shoal.prefix import PAGE_TOKENS
from shoal.server.kv.attention import AttentionBackend
from shoal.server.kv.batch import (
    Chunk,
    HalfWritten,
    PackedPass,
    Pass,
    each_alone_if_together_fails,
    row_overrides,
    segments,
)
from shoal.server.kv.batch_cache import BatchCache, Columns
from shoal.server.kv.paged_cache import PagedCache
from shoal.spans import Span


class BatchedPass:
    """The tokens of chunks in batches, through the family's own layers and a cache that speaks Transformers' terms."""

    def __init__(self, body: Body, cache: PagedCache) -> None:
        self._body = body
        self._cache = cache
        weights = sum(each.nbytes for each in (*body.parameters(), *body.buffers()))
        # How many cached tokens are read in the time that reading the weights takes.
        self._tokens_per_pass = weights / max(1, cache.shapes.token_bytes(body.backbone.dtype))

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Chunk]) -> list[Tensor | Exception]:
        self._cache.prepare([chunk.growth for chunk in chunks])
        return each_alone_if_together_fails(self._compute, chunks)

    def _compute(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        flows = [_Flow(chunk, self._body) for chunk in chunks]
        caches: list[BatchCache] = []
        for segment in segments([chunk.span for chunk in chunks]):
            for batch in self._batches([each for each in flows if segment in each.chunk.span]):
                caches.append(self._run(segment, batch))
        for each in flows:
            self._cache.write_outputs(each.new_slots_BT.flatten(), each.hidden_BTD.flatten(0, 1))
        try:
            for cache in caches:
                cache.commit()
        except Exception as error:
            raise HalfWritten(f"{type(error).__name__} while states were written") from error
        return [each.hidden_BTD for each in flows]

    def _batches(self, flows: Sequence[_Flow]) -> list[list[_Flow]]:
        """What is computed together: all next tokens that the model computes alike.

        But not if long sequences would make short ones so long that it takes more time than a pass of their own.
        """
        batches = [[each] for each in flows if not each.decodes]
        alike: dict[tuple[int, ...], list[_Flow]] = defaultdict(list)
        for each in flows:
            if each.decodes:
                alike[each.regimes(self._body.family)].append(each)
        for decoding in alike.values():
            groups = length_groups([each.num_computed for each in decoding], self._tokens_per_pass)
            batches += [[decoding[index] for index in group] for group in groups]
        return batches

    def _run(self, segment: Span, batch: Sequence[_Flow]) -> BatchCache:
        """Take a batch through a segment of the blocks. Returns the cache, whose states are not written yet."""
        first, num_tokens = batch[0], batch[0].hidden_BTD.shape[1]
        step = 1 if self._body.family.step_by_step and first.num_computed else num_tokens
        num_blocks = self._body.backbone.config.num_hidden_layers
        cache: BatchCache | None = None
        outputs: list[Tensor] = []
        for start in range(0, num_tokens, step):
            new = slice(start, start + step)
            columns = _columns(batch, new)
            if cache is None:
                cache = BatchCache(self._cache, columns, segment, num_blocks)
            cache.columns = columns
            output_GTD = self._body.forward_batch(
                torch.cat([each.hidden_BTD[:, new] for each in batch]),
                torch.cat([each.positions_BT[:, new] for each in batch]),
                span=segment,
                state=cache,
                attention_mask=_mask(batch, new.stop),
                overrides=row_overrides(
                    segment, [(each.chunk, each.hidden_BTD[:, new].shape[:2].numel(), start) for each in batch]
                ),
            )
            outputs.append(output_GTD)
        assert cache is not None
        sizes = [len(each.hidden_BTD) for each in batch]
        for each, hidden_BTD in zip(batch, torch.cat(outputs, dim=1).split(sizes), strict=True):
            each.hidden_BTD = hidden_BTD
        return cache


def pass_over(body: Body, cache: PagedCache, attention: AttentionBackend[Any] | None = None) -> Pass:
    """How a body computes chunks: packed if its family can, with this `attention`; in batches otherwise."""
    return PackedPass(body, cache, attention) if body.family.packable else BatchedPass(body, cache)


class _Flow:
    """A chunk on its way through the blocks."""

    def __init__(self, chunk: Chunk, body: Body) -> None:
        device = body.backbone.device
        self.chunk = chunk
        self.num_computed = chunk.num_computed_tokens
        self.hidden_BTD = chunk.hidden_BTD.to(device, body.backbone.dtype)
        self.positions_BT = chunk.new_positions.to(device)
        self.slots_BS = _token_slots(chunk.pages, self.num_computed + chunk.hidden_BTD.shape[1]).to(device)
        self.new_slots_BT = self.slots_BS[:, self.num_computed :]

    def regimes(self, family: Family) -> tuple[int, ...]:
        """What has to be equal for sequences to be computed alike.

        Some models go by positions, which padding does not have, and others by columns, which it has.
        """
        positions, columns = int(self.positions_BT.max()) + 1, self.slots_BS.shape[1]
        return tuple(regime.of(length) for regime in family.regimes for length in (positions, columns))

    @property
    def decodes(self) -> bool:
        """Whether it is one next token of each sequence."""
        return self.hidden_BTD.shape[1] == 1 and self.num_computed > 0


def _token_slots(pages: Sequence[Sequence[int]], num_tokens: int) -> Tensor:
    """The slots [B, S] of the first tokens of sequences that have as many pages each."""
    first_B1 = torch.tensor([list(each) for each in pages])[:, :, None] * PAGE_TOKENS
    return (first_B1 + torch.arange(PAGE_TOKENS)).flatten(1)[:, :num_tokens]


def _columns(batch: Sequence[_Flow], new: slice) -> Columns:
    """Where the tokens of a batch are, up to the end of its new ones."""
    longest = max(each.num_computed for each in batch) + new.stop
    slots = [_left_padded(each.slots_BS[:, : each.num_computed + new.stop], longest) for each in batch]
    return Columns(
        slots_GS=torch.cat(slots),
        new_slots_GT=torch.cat([each.new_slots_BT[:, new] for each in batch]),
        num_computed=longest - (new.stop - new.start),
        state_slots=tuple(slot for each in batch for slot in each.chunk.slots),
    )


def _left_padded(slots_BS: Tensor, longest: int) -> Tensor:
    """The same slots in the last of `longest` columns. The columns before have a slot of the sequence, too."""
    padding = longest - slots_BS.shape[1]
    return torch.cat((slots_BS[:, :1].expand(-1, padding), slots_BS), dim=1) if padding else slots_BS


def _mask(batch: Sequence[_Flow], num_new: int) -> Tensor | None:
    """The attention mask [G, S] of a batch, up to the end of its new tokens; `None` if there is nothing to hide."""
    lengths = [each.num_computed + num_new for each in batch]
    longest = max(lengths)
    if min(lengths) == longest and all(each.chunk.mask_BS is None for each in batch):
        return None
    masks: list[Tensor] = []
    for each, length in zip(batch, lengths, strict=True):
        mask_BS = each.chunk.mask_BS
        if mask_BS is None:
            mask_BS = torch.ones(len(each.hidden_BTD), length, dtype=torch.long)
        masks.append(torch.nn.functional.pad(mask_BS[:, :length].long(), (longest - length, 0)))
    return torch.cat(masks).to(batch[0].hidden_BTD.device)
