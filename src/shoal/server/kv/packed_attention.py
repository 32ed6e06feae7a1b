"""Attention over pages: the tokens of one pass, each with the keys and values of its own sequence only.

Sequences that decode one token each are computed together, those of like length in one product; a sequence with several
new tokens is computed by itself. Nothing is padded to the longest, and what is cached is read where it lies.
"""

# T packed tokens, G sequences of a group, S tokens of the longest of them, H heads, J heads of keys, K their size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import UnsupportedOperation
from shoal.server.kv.paged_cache import PagedCache

LIKE_LENGTH = 1.25
"""Sequences are computed together whose lengths differ by at most so much: the rest would be read in vain."""

_OPTIONS = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})
_OF_NO_CONSEQUENCE = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}
)


@dataclass(frozen=True)
class NewTokens:
    """A sequence's part in a pass: its pages, how much of it is cached, and where its new tokens lie in the pack.

    `mask` `[S]` is false where a token, cached or new, is padding; `None` means that none is.
    """

    pages: Sequence[int]
    num_cached: int
    start: int
    end: int
    mask: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """All its tokens, the new ones too."""
        return self.num_cached + self.end - self.start

    @property
    def decodes(self) -> bool:
        return self.end - self.start == 1 and self.mask is None


@dataclass(frozen=True)
class Group:
    """Decoding sequences of like length: the rows of the pack that are theirs, and their pages, [G, pages]."""

    rows: Tensor
    pages: Tensor
    lengths: Tensor
    shortest: int
    longest: int
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores, [G, 1, 1, S]: the same for all blocks with this window, so it is made once."""
        if window not in self.masks:
            self.masks[window] = self._mask(window, dtype)
        return self.masks[window]

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if self.shortest == self.longest and (window is None or window >= self.longest):
            return None
        index = torch.arange(self.longest, device=self.lengths.device)
        seen = index < self.lengths[:, None]
        if window is not None:
            seen &= index >= self.lengths[:, None] - window
        return _additive(seen, dtype)[:, None, None]


@dataclass(frozen=True)
class Sight:
    """What a sequence's new tokens see.

    `mask` `[H / J * T, S]` is added to the scores, for each of the heads that share keys. `blind_T` is true for tokens
    that see nothing, as padding before the text. `None` means that none is. Their output is 0, as in Transformers.
    """

    mask: Tensor
    blind_T: Tensor | None


class PackedAttention:
    """The `AttentionFunction` of one pass: writes what is new into its pages, and attends to what is there."""

    def __init__(self, cache: PagedCache, sequences: Sequence[NewTokens], slots_T: Tensor) -> None:
        self._cache = cache
        self._slots = slots_T
        self._groups = groups_of([each for each in sequences if each.decodes], device=slots_T.device)
        self._others = [each for each in sequences if not each.decodes]
        self._sights: dict[tuple[int, int | None, int], Sight] = {}

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """The outputs [1, T, H, V] of a block. Raises `UnsupportedOperation` for an attention that it does not know."""
        if strange := [name for name in options.keys() - _OPTIONS - _OF_NO_CONSEQUENCE if options[name] is not None]:
            raise UnsupportedOperation(f"packed attention knows no {strange[0]}")
        window: int | None = options.get("sliding_window")
        core = _Core(query.shape[-1], options)
        self._cache.write(block, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        output_THV = query.new_empty((query.shape[2], query.shape[1], value.shape[-1]))
        for group in self._groups:
            keys, values = self._cache.read(block, group.pages, group.longest)
            query_GHK = query[0, :, group.rows].transpose(0, 1)
            output_THV[group.rows] = core.decode(query_GHK, keys, values, group.mask(window, query.dtype))
        for index, each in enumerate(self._others):
            new = slice(each.start, each.end)
            if each.num_cached == 0 and each.mask is None and window is None:
                keys, values, sight = key[:, :, new], value[:, :, new], None
            else:
                keys, values = self._cache.read_one(block, each.pages, each.num_tokens)
                sight = self._sight(index, each, window, query, num_shared=query.shape[1] // key.shape[1])
            output_THV[new] = core.attend(query[:, :, new], keys, values, sight)[0].transpose(0, 1)
        return output_THV[None]

    def _sight(self, index: int, each: NewTokens, window: int | None, query: Tensor, *, num_shared: int) -> Sight:
        """What a sequence's new tokens see: the same for all blocks with this window, so it is made once."""
        if (index, window, num_shared) not in self._sights:
            self._sights[index, window, num_shared] = _sight_of(each, window, query, num_shared)
        return self._sights[index, window, num_shared]


def _sight_of(each: NewTokens, window: int | None, query: Tensor, num_shared: int) -> Sight:
    keys = torch.arange(each.num_tokens, device=query.device)
    queries = torch.arange(each.num_cached, each.num_tokens, device=query.device)[:, None]
    seen_TS = keys <= queries
    if window is not None:
        seen_TS &= keys > queries - window
    blind_T = None
    if each.mask is not None:
        seen_TS &= each.mask.to(query.device)
        blind_T = ~seen_TS.any(dim=1)
        seen_TS |= blind_T[:, None] & (keys == queries)  # a softmax over nothing is no number
    return Sight(_additive(seen_TS, query.dtype).repeat(num_shared, 1), blind_T)


def groups_of(sequences: Sequence[NewTokens], *, device: torch.device) -> list[Group]:
    """Decoding sequences, put together by length."""
    groups: list[list[NewTokens]] = []
    for each in sorted(sequences, key=lambda sequence: len(sequence.pages)):
        if groups and len(each.pages) <= LIKE_LENGTH * len(groups[-1][0].pages) + 1:
            groups[-1].append(each)
        else:
            groups.append([each])
    return [_group(members, device) for members in groups]


def _group(members: Sequence[NewTokens], device: torch.device) -> Group:
    num_pages = len(members[-1].pages)
    pages = [[*each.pages, *[each.pages[0]] * (num_pages - len(each.pages))] for each in members]  # any page would do
    lengths = [each.num_tokens for each in members]
    return Group(
        rows=torch.tensor([each.start for each in members], device=device),
        pages=torch.tensor(pages, device=device),
        lengths=torch.tensor(lengths, device=device),
        shortest=min(lengths),
        longest=max(lengths),
    )


class _Core:
    """Scaled dot products, as the block wants them: capped, with sinks, or plain.

    The heads that share keys are treated as so many queries of one head, so that the keys are read once.
    """

    def __init__(self, key_size: int, options: dict[str, Any]) -> None:
        scaling = options.get("scaling")
        self._scaling: float = key_size**-0.5 if scaling is None else scaling
        self._softcap: float | None = options.get("softcap")
        self._sinks: Tensor | None = options.get("s_aux")

    def decode(self, query_GHK: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """One query a sequence, [G, H, V]; keys and values are [G, J, S, K]."""
        num_groups, num_heads, key_size = query_GHK.shape
        num_key_heads = keys.shape[1]
        query = query_GHK.reshape(num_groups, num_key_heads, num_heads // num_key_heads, key_size)
        if self._softcap is None and self._sinks is None:
            output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self._scaling)
        else:
            sinks = None if self._sinks is None else self._sinks.view(num_key_heads, -1)
            output = self._in_steps(query, keys, values, mask, sinks)
        return output.reshape(num_groups, num_heads, values.shape[-1])

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, sight: Sight | None) -> Tensor:
        """The outputs [1, H, T, V] of a sequence; without a sight, its tokens see all those before them."""
        mask = None if sight is None else sight.mask
        num_heads, num_key_heads, num_queries = query.shape[1], keys.shape[1], query.shape[2]
        num_shared = num_heads // num_key_heads
        plain = self._softcap is None and self._sinks is None
        if mask is None and plain:
            return F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=self._scaling, enable_gqa=num_shared > 1
            )
        if mask is None:
            mask = _additive(torch.ones(num_queries, num_queries, dtype=torch.bool).tril(), query.dtype)
            mask = mask.to(query.device).repeat(num_shared, 1)
        query = query.reshape(1, num_key_heads, num_shared * num_queries, -1)
        if plain:
            output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self._scaling)
        else:
            sinks = None if self._sinks is None else self._sinks.view(num_key_heads, num_shared, 1)
            sinks = None if sinks is None else sinks.expand(-1, -1, num_queries).flatten(1)
            output = self._in_steps(query, keys, values, mask, sinks)
        output = output.reshape(1, num_heads, num_queries, values.shape[-1])
        if sight is not None and sight.blind_T is not None:
            output = output.masked_fill(sight.blind_T[:, None], 0.0)
        return output

    def _in_steps(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """As Transformers' models write it out. A sink [heads, queries] takes attention and gives nothing."""
        scores = (query @ keys.transpose(2, 3)) * self._scaling
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        if mask is not None:
            scores = scores + mask
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(scores)[None, :, :, None].expand(len(scores), -1, -1, 1)), dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return weights[..., : keys.shape[2]] @ values


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
