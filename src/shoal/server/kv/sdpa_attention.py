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


@dataclass(frozen=True)
class DecodeGroup:
    """Decoding sequences of similar length: where each one's token is in the pass, its pages, and its length.

    `masks` holds the group's masks by window. All blocks with a window use one, and the first of them makes it.
    """

    rows_G: Tensor
    pages_GP: Tensor
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

    `scores` [H / J * T, S] is added to the scores: the rows repeat for each of the query heads that share a key head.
    `blind_T` is true for tokens that see nothing, such as padding before the text: their output is 0, as in
    Transformers. `None` means that every token sees something.
    """

    scores: Tensor
    blind_T: Tensor | None


@dataclass(frozen=True)
class SdpaMetadata:
    """A pass: its slots, the groups that decode, and the sequences that are computed alone.

    `masks` holds the latter's masks by sequence, window, and query heads for each key head, as in `DecodeGroup`.
    """

    slot_mapping_T: Tensor
    groups: tuple[DecodeGroup, ...]
    others: tuple[PackedSequence, ...]
    masks: dict[tuple[int, int | None, int], SequenceMask] = field(default_factory=dict, compare=False)

    def mask(self, index: int, window: int | None, query: Tensor, *, num_shared: int) -> SequenceMask:
        """What the new tokens of `others[index]` see."""
        if (index, window, num_shared) not in self.masks:
            self.masks[index, window, num_shared] = _mask_of(self.others[index], window, query, num_shared)
        return self.masks[index, window, num_shared]


class SdpaAttention:
    """The `AttentionBackend` for every device that PyTorch knows."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache

    def metadata(self, batch: PackedBatch) -> SdpaMetadata:
        """Group the sequences of a pass."""
        device = batch.slot_mapping_T.device
        return SdpaMetadata(
            slot_mapping_T=batch.slot_mapping_T,
            groups=tuple(group_by_length([each for each in batch.sequences if each.decodes], device=device)),
            others=tuple(each for each in batch.sequences if not each.decodes),
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
            keys, values = self._cache.read(block, group.pages_GP, group.longest)
            query_GHK = query[0, :, group.rows_G].transpose(0, 1)
            output_THV[group.rows_G] = product.decode(query_GHK, keys, values, group.mask(window, query.dtype))
        for index, each in enumerate(metadata.others):
            new = slice(each.start, each.end)
            if each.num_computed_tokens == 0 and each.mask_S is None and window is None:
                keys, values, mask = key[:, :, new], value[:, :, new], None
            else:
                keys, values = self._cache.read_one(block, each.pages, each.num_tokens)
                mask = metadata.mask(index, window, query, num_shared=query.shape[1] // key.shape[1])
            output_THV[new] = product.prefill(query[:, :, new], keys, values, mask)[0].transpose(0, 1)
        return output_THV[None]


def _mask_of(each: PackedSequence, window: int | None, query: Tensor, num_shared: int) -> SequenceMask:
    keys_S = torch.arange(each.num_tokens, device=query.device)
    queries_T1 = torch.arange(each.num_computed_tokens, each.num_tokens, device=query.device)[:, None]
    visible_TS = keys_S <= queries_T1
    if window is not None:
        visible_TS &= keys_S > queries_T1 - window
    blind_T = None
    if each.mask_S is not None:
        visible_TS &= each.mask_S.to(query.device)
        blind_T = ~visible_TS.any(dim=1)
        visible_TS |= blind_T[:, None] & (keys_S == queries_T1)  # a softmax over nothing gives NaN
    return SequenceMask(_additive(visible_TS, query.dtype).repeat(num_shared, 1), blind_T)


def group_by_length(sequences: Sequence[PackedSequence], *, device: torch.device) -> list[DecodeGroup]:
    """Groups of decoding sequences whose numbers of pages differ by at most `MAX_LENGTH_RATIO`."""
    groups: list[list[PackedSequence]] = []
    for each in sorted(sequences, key=lambda sequence: len(sequence.pages)):
        if groups and len(each.pages) <= MAX_LENGTH_RATIO * len(groups[-1][0].pages) + 1:
            groups[-1].append(each)
        else:
            groups.append([each])
    return [_group(members, device) for members in groups]


def _group(members: Sequence[PackedSequence], device: torch.device) -> DecodeGroup:
    num_pages = len(members[-1].pages)
    # Shorter sequences are filled up with a page of their own, which the mask hides.
    pages = [[*each.pages, *[each.pages[0]] * (num_pages - len(each.pages))] for each in members]
    lengths = [each.num_tokens for each in members]
    return DecodeGroup(
        rows_G=torch.tensor([each.start for each in members], device=device),
        pages_GP=torch.tensor(pages, device=device),
        lengths_G=torch.tensor(lengths, device=device),
        shortest=min(lengths),
        longest=max(lengths),
    )


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
            scores = _additive(torch.ones(num_queries, num_queries, dtype=torch.bool).tril(), query.dtype)
            scores = scores.to(query.device).repeat(num_shared, 1)
        else:
            scores = mask.scores
        query = query.reshape(1, num_key_heads, num_shared * num_queries, -1)
        if self._is_plain:
            output = F.scaled_dot_product_attention(query, keys, values, attn_mask=scores, scale=self._scaling)
        else:
            sinks = None if self._sinks_H is None else self._sinks_H.view(num_key_heads, num_shared, 1)
            sinks = None if sinks is None else sinks.expand(-1, -1, num_queries).flatten(1)
            output = self._in_steps(query, keys, values, scores, sinks)
        output = output.reshape(1, num_heads, num_queries, values.shape[-1])
        if mask is not None and mask.blind_T is not None:
            output = output.masked_fill(mask.blind_T[:, None], 0.0)
        return output

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


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
