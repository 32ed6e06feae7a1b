"""The reference attention backend: it gathers pages and calls PyTorch's scaled dot products.

Sequences that decode are grouped by length, and each group is one product. A sequence with several new tokens is a
product of its own. So no sequence is padded to the longest of the pass, and pages in a row are read without a copy.
"""

# T new tokens of a pass or a sequence, G sequences of a group, P pages of the longest of them, S its tokens
# H heads of queries, J heads of keys, K size of a key, V size of a value

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.server.kv.attention import AttentionOptions, PackedBatch, PackedSequence
from shoal.server.kv.paged_cache import PagedCache

MAX_LENGTH_RATIO = 1.25
"""The longest sequence of a group has at most this many times the pages of the shortest, plus one.

A larger ratio means fewer products, and more pages that are read for nothing.
"""
MAX_SCORES = 1 << 24
"""Scores that are in memory at once, where attention is computed in steps: 64 MiB in float32."""


@dataclass(frozen=True)
class DecodeGroup:
    """Decoding sequences of similar length: where each one's token is in the pass, their pages, and each one's length.

    `masks` holds the group's masks by window. All blocks with a window use one, and the first of them makes it.
    """

    rows_G: Tensor
    pages: Tensor | slice
    lengths_G: Tensor
    shortest: int
    longest: int
    masks: dict[int | None, Tensor | None] = field(default_factory=dict, compare=False)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, [G, 1, 1, S]; `None` means nothing."""
        if window not in self.masks:
            self.masks[window] = self._make_mask(window, dtype)
        return self.masks[window]

    def _make_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if self.shortest == self.longest and (window is None or window >= self.longest):
            return None
        index_S = torch.arange(self.longest, device=self.lengths_G.device)
        visible_GS = index_S < self.lengths_G[:, None]
        if window is not None:
            visible_GS &= index_S >= self.lengths_G[:, None] - window
        return _additive(visible_GS, dtype)[:, None, None]


@dataclass(frozen=True)
class SequenceMask:
    """What the new tokens of one sequence see.

    `scores` [T, S] is added to the scores; its rows are in reverse order, the last token first (see `_mask_of`).
    `blind_T` is true for tokens that see nothing, such as padding before the text: their output is 0, as in
    Transformers. `None` means that every token sees something.
    """

    scores: Tensor
    blind_T: Tensor | None


@dataclass(frozen=True)
class SdpaMetadata:
    """A pass: its slots, the groups that decode, and the sequences that are computed alone.

    `pages` are the latter's pages, and `masks` holds their masks by sequence and window, as in `DecodeGroup`.
    """

    slot_mapping_T: Tensor
    groups: tuple[DecodeGroup, ...]
    others: tuple[PackedSequence, ...]
    pages: tuple[Tensor | slice, ...]
    masks: dict[tuple[int, int | None], SequenceMask] = field(default_factory=dict, compare=False)

    def mask(self, index: int, window: int | None, query: Tensor) -> SequenceMask:
        """What the new tokens of `others[index]` see."""
        if (index, window) not in self.masks:
            self.masks[index, window] = _mask_of(self.others[index], window, query)
        return self.masks[index, window]


class SdpaAttention:
    """The `AttentionBackend` for every device that PyTorch knows."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache

    def metadata(self, batch: PackedBatch) -> SdpaMetadata:
        """Group the sequences of a pass."""
        others = tuple(each for each in batch.sequences if not each.decodes)
        return SdpaMetadata(
            slot_mapping_T=batch.slot_mapping_T,
            groups=tuple(
                self._group(each) for each in group_by_length([each for each in batch.sequences if each.decodes])
            ),
            others=others,
            pages=tuple(self._cache.pages_of([each.pages]) for each in others),
        )

    def _group(self, members: Sequence[PackedSequence]) -> DecodeGroup:
        num_pages = len(members[-1].pages)
        # Shorter sequences are filled up with a page of their own, which the mask hides.
        pages = [[*each.pages, *[each.pages[0]] * (num_pages - len(each.pages))] for each in members]
        lengths = [each.num_tokens for each in members]
        return DecodeGroup(
            rows_G=torch.tensor([each.start for each in members], device=self._cache.device),
            pages=self._cache.pages_of(pages),
            lengths_G=torch.tensor(lengths, device=self._cache.device),
            shortest=min(lengths),
            longest=max(lengths),
        )

    def attend(
        self, metadata: SdpaMetadata, block: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        window = options.sliding_window
        product = _Product(query.shape[-1], options)
        self._cache.write(block, metadata.slot_mapping_T, key[0].transpose(0, 1), value[0].transpose(0, 1))
        output_THV = query.new_empty((query.shape[2], query.shape[1], value.shape[-1]))
        for group in metadata.groups:
            keys, values = self._cache.read(block, group.pages, group.longest)
            query_GHK = query[0, :, group.rows_G].transpose(0, 1)
            output_THV[group.rows_G] = product.decode(query_GHK, keys, values, group.mask(window, query.dtype))
        for index, each in enumerate(metadata.others):
            new = slice(each.start, each.end)
            if each.num_computed_tokens == 0 and each.mask_S is None and window is None:
                keys, values, mask = key[:, :, new], value[:, :, new], None
            else:
                keys, values = self._cache.read(block, metadata.pages[index], each.num_tokens)
                mask = metadata.mask(index, window, query)
            output_THV[new] = product.prefill(query[:, :, new], keys, values, mask)[0].transpose(0, 1)
        return output_THV[None]


def _mask_of(each: PackedSequence, window: int | None, query: Tensor) -> SequenceMask:
    """The mask of a sequence without padding is a view of one vector, so a long context takes no [T, S] of memory.

    With the last token first, what a token sees depends on the sum of its row and the column alone. Four new tokens
    behind two, without a window:

        vector     0 0 0 0 0 0 - - -            - is minus infinity
        row 0      0 0 0 0 0 0                  the last token sees all six
        row 1        0 0 0 0 0 -
        row 2          0 0 0 0 - -
        row 3            0 0 0 - - -            the first token sees those before it and itself
    """
    num_new, num_tokens, device = each.end - each.start, each.num_tokens, query.device
    index = torch.arange(num_tokens + num_new - 1, device=device)
    visible = index < num_tokens
    if window is not None:
        visible &= index >= num_tokens - window
    if each.mask_S is None:
        return SequenceMask(_additive(visible, query.dtype).as_strided((num_new, num_tokens), (1, 1)), None)
    visible_TS = visible.as_strided((num_new, num_tokens), (1, 1)) & each.mask_S.to(device)
    blind_T1 = ~visible_TS.any(dim=1, keepdim=True)
    itself_TS = index[:num_tokens] == index[each.num_computed_tokens : num_tokens].flip(0)[:, None]
    visible_TS |= blind_T1 & itself_TS  # a softmax over nothing gives NaN
    return SequenceMask(_additive(visible_TS, query.dtype), blind_T1[:, 0].flip(0))


def group_by_length(sequences: Sequence[PackedSequence]) -> list[list[PackedSequence]]:
    """Groups of decoding sequences whose numbers of pages differ by at most `MAX_LENGTH_RATIO`."""
    groups: list[list[PackedSequence]] = []
    for each in sorted(sequences, key=lambda sequence: len(sequence.pages)):
        if groups and len(each.pages) <= MAX_LENGTH_RATIO * len(groups[-1][0].pages) + 1:
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


class _Product:
    """Scaled dot products as a layer wants them: plain, with a soft cap, or with sinks.

    The query heads that share a key head are computed as more queries of one head, so the keys are read once.
    """

    def __init__(self, key_size: int, options: AttentionOptions) -> None:
        self._scaling = key_size**-0.5 if options.scaling is None else options.scaling
        self._softcap = options.softcap
        self._sinks_H = options.sinks_H
        self._is_plain = options.softcap is None and options.sinks_H is None

    def decode(self, query_GHK: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The outputs [G, H, V] of one query a sequence; keys and values are [G, J, S, K] and [G, J, S, V]."""
        num_groups, num_heads, key_size = query_GHK.shape
        num_key_heads = keys.shape[1]
        query = query_GHK.reshape(num_groups, num_key_heads, num_heads // num_key_heads, key_size)
        if self._is_plain:
            output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self._scaling)
        else:
            sinks = None if self._sinks_H is None else self._sinks_H.view(num_key_heads, -1)
            output = self._in_steps(query, keys, values, mask, sinks)
        return output.reshape(num_groups, num_heads, values.shape[-1])

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, mask: SequenceMask | None) -> Tensor:
        """The outputs [1, H, T, V] of one sequence; without a mask, each token sees those up to itself."""
        num_heads, num_key_heads, num_queries = query.shape[1], keys.shape[1], query.shape[2]
        num_shared = num_heads // num_key_heads
        if mask is None and self._is_plain:
            return F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=self._scaling, enable_gqa=num_shared > 1
            )
        if mask is None:
            mask = _mask_of(PackedSequence((), 0, 0, num_queries), None, query)
        query = query.view(num_key_heads, num_shared, num_queries, -1).flip(2)  # the last token first, as in the mask
        if self._is_plain:
            # The heads that share keys are a dimension in which the keys have no stride.
            keys, values = (each[0][:, None].expand(-1, num_shared, -1, -1) for each in (keys, values))
            output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask.scores, scale=self._scaling)
        else:
            parts = [
                self._prefill_in_steps(query[:, :, rows], keys, values, mask.scores[rows])
                for rows in _few_scores(num_heads, num_queries, keys.shape[2])
            ]
            output = torch.cat(parts, dim=2)
        output = output.flip(2).reshape(1, num_heads, num_queries, values.shape[-1])
        return output if mask.blind_T is None else output.masked_fill(mask.blind_T[:, None], 0.0)

    def _prefill_in_steps(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The outputs [J, H / J, T, V] of queries of that shape, with all queries of a key head in one product."""
        num_key_heads, num_shared, num_queries, _ = query.shape
        sinks = None if self._sinks_H is None else self._sinks_H.view(num_key_heads, num_shared, 1)
        sinks = None if sinks is None else sinks.expand(-1, -1, num_queries).flatten(1)
        output = self._in_steps(query.flatten(1, 2)[None], keys, values, mask.repeat(num_shared, 1), sinks)
        return output.view(num_key_heads, num_shared, num_queries, -1)

    def _in_steps(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """The operators of Transformers' eager attention; `sinks` are [J, queries of a key head]."""
        scores = (query @ keys.transpose(2, 3)) * self._scaling
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        if mask is not None:
            scores = scores + mask
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(scores)[None, :, :, None].expand(len(scores), -1, -1, 1)), dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return weights[..., : keys.shape[2]] @ values


def _few_scores(num_heads: int, num_queries: int, num_keys: int) -> list[slice]:
    """Parts of the queries, each with at most `MAX_SCORES` scores, or of one query."""
    num_rows = max(1, MAX_SCORES // (num_heads * num_keys))
    return [slice(start, start + num_rows) for start in range(0, num_queries, num_rows)]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
