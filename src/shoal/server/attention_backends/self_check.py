"""Whether a backend gives the numbers of the reference: on random inputs, in the shapes and the dtype that are served.

Both are compared with the reference in float32. A rounding error is as large as the dtype explains, or as what the
reference itself makes of the same inputs; anything larger is a defect of the backend, of the kernel below it, or of how
they were built for this device.
"""

# T new tokens of a pass, H heads of queries, J heads of keys, K size of a key, V of a value

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shoal.model.body import Body
from shoal.prefix import PAGE_TOKENS
from shoal.server.kv.attention import (
    AttentionBackend,
    AttentionOptions,
    Feature,
    PackedBatch,
    PackedSequence,
    PartialBackend,
)
from shoal.server.kv.cache_shapes import CacheShapes, KeyValueShape
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.pages import pages_for
from shoal.server.kv.sdpa_attention import SdpaAttention

BATCHES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 1), (1, 1), (14, 1), (15, 1), (16, 1), (47, 1), (130, 1), (517, 1)),
    ((0, 1), (0, 16), (0, 17), (0, 150)),
    ((0, 33), (31, 1), (40, 9), (100, 70), (255, 1), (15, 2)),
)
"""The passes that are computed: for each sequence, the tokens that are in the cache and the new ones. Lengths are
around the ends of pages, and decoding, prefills and both together occur."""
WINDOWS = (1, 5, 16, 100, 1000)
"""Sliding windows: of the token alone, within a page, of a page, across pages, and longer than all sequences."""
SOFT_CAP = 2.0
"""A bound that is reached by many of the random scores."""
ELSEWHERE = 50.0
"""What stands in the pages of others: a backend that reads it is far off."""
TYPICAL_ERROR = 0.75
"""The root mean square of the relative errors that are rounding, in units of the dtype's epsilon. It is 0.3 to 0.5 for
kernels that add in float32; a backend that is wrong by 1 % has 1.3 in bfloat16, the least exact of all dtypes."""
LEAST_ERROR = 1e-5
"""Rounding errors of float32, which adds many numbers in another order than the reference does."""
WORST_ERROR = 8.0
"""How many times the typical error the worst vector may have."""
OWN_ERRORS = 1.5
"""A backend may have this many times the errors that the reference has on the same inputs in the same dtype."""


class WrongNumbers(Exception):
    """A backend computes something else than the reference."""


@dataclass(frozen=True)
class Errors:
    """Relative errors of output vectors: the root of their mean square, and the largest. NaN is an error too."""

    typical: float
    worst: float

    @classmethod
    def between(cls, found: Tensor, expected: Tensor) -> Errors:
        """The errors of [1, T, H, V] vectors. Those that should be 0 have to be."""
        difference = (found.float() - expected.float()).norm(dim=-1)
        relative = difference / expected.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return cls(float(relative.square().mean().sqrt()), float(relative.max()))


def check(build: Callable[[PagedCache], PartialBackend[Any]], body: Body, cache: PagedCache, *, num_heads: int) -> None:
    """Raise `WrongNumbers`, or what the backend raises, unless it gives the reference's numbers for all its features.

    It is built for caches like `cache`, the one that is served, and for as many heads of queries as `num_heads`.
    """
    for shape in {(each.num_heads, each.key_size, each.value_size) for each in cache.shapes.tokens.values()}:
        _Comparison(build, body, cache, KeyValueShape(*shape)).run(num_heads)


class _Comparison:
    """A backend, the reference and the reference in float32, each with a small cache of its own of equal content."""

    def __init__(
        self,
        build: Callable[[PagedCache], PartialBackend[Any]],
        body: Body,
        cache: PagedCache,
        shape: KeyValueShape,
    ) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._device = body.backbone.device
        self._dtype = cache.dtype
        self._shape = shape
        shapes = CacheShapes({0: shape, 1: shape})
        most_pages = max(sum(pages_for(sum(each)) for each in batch) for batch in BATCHES)
        self._num_pages = most_pages + 3
        caches = [
            PagedCache(body, shapes, self._num_pages, kind=cache.kind, dtype=dtype)
            for dtype in (cache.dtype, cache.dtype, torch.float32)
        ]
        self._caches = caches
        self._backend = build(caches[0])
        self._reference, self._exact = SdpaAttention(caches[1]), SdpaAttention(caches[2])

    def run(self, num_heads: int) -> None:
        num_key_heads = self._shape.num_heads
        num_shared = num_heads // num_key_heads if num_heads % num_key_heads == 0 else 1
        groups = (1, num_shared if num_shared > 1 else 4)
        for lengths in BATCHES:
            for is_padded in (False, True)[: 1 + (Feature.PADDING in self._backend.features)]:
                batch = self._batch(lengths, is_padded=is_padded)
                for group in groups:
                    self._compare(batch, num_key_heads * group)

    def _compare(self, batch: PackedBatch, num_heads: int) -> None:
        """One pass, with the features that the backend supports, alone and together, in both blocks by turns."""
        backends: Sequence[AttentionBackend[Any]] = (self._backend, self._reference, self._exact)
        described = [backend.metadata(batch) for backend in backends]
        num_tokens = len(batch.slot_mapping_T)
        for index, options in enumerate(self._options(num_heads)):
            query = self._normal(1, num_heads, num_tokens, self._shape.key_size)
            key = self._normal(1, self._shape.num_heads, num_tokens, self._shape.key_size)
            value = self._normal(1, self._shape.num_heads, num_tokens, self._shape.value_size)
            found, own, exact = (
                backend.attend(metadata, index % 2, query.to(dtype), key.to(dtype), value.to(dtype), options)
                for backend, metadata, dtype in zip(
                    backends, described, (self._dtype, self._dtype, torch.float32), strict=True
                )
            )
            what = _named(options, batch)
            if found.shape != exact.shape or found.dtype != self._dtype:
                raise WrongNumbers(f"{what}: outputs {found.dtype} {tuple(found.shape)}, not {tuple(exact.shape)}")
            self._judge(Errors.between(found, exact), Errors.between(own, exact), what)
            ours, theirs = (each.gather(index % 2, batch.slot_mapping_T) for each in self._caches[:2])
            if not all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True)):
                raise WrongNumbers(f"{what}: the cache holds other keys or values")

    def _judge(self, found: Errors, own: Errors, what: str) -> None:
        typical = max(TYPICAL_ERROR * torch.finfo(self._dtype).eps, LEAST_ERROR)
        most = Errors(
            max(typical, OWN_ERRORS * own.typical),
            max(WORST_ERROR * typical, OWN_ERRORS * own.worst),
        )
        if not (found.typical <= most.typical and found.worst <= most.worst):  # NaN is not less than anything
            raise WrongNumbers(
                f"{what}: off by {found.typical:.1%}, at worst {found.worst:.1%}; "
                f"{most.typical:.1%} and {most.worst:.1%} are rounding"
            )

    def _options(self, num_heads: int) -> Iterator[AttentionOptions]:
        features = self._backend.features
        plain = AttentionOptions()
        yield plain
        yield AttentionOptions(scaling=0.5 * self._shape.key_size**-0.5)
        kinds = [plain]
        if Feature.SOFT_CAPS in features:
            kinds += [replace(each, softcap=SOFT_CAP) for each in kinds]
        if Feature.SINKS in features:
            sinks_H = self._normal(num_heads)
            kinds += [replace(each, sinks_H=sinks_H) for each in kinds]
        yield from kinds[1:]
        if Feature.WINDOWS in features:
            yield from (
                replace(kinds[index % len(kinds)], sliding_window=window) for index, window in enumerate(WINDOWS)
            )

    def _batch(self, lengths: Sequence[tuple[int, int]], *, is_padded: bool) -> PackedBatch:
        """A pass whose pasts are in the caches. Every second sequence has its pages in disorder."""
        pages = torch.randperm(self._num_pages, generator=self._random).tolist()
        sequences: list[PackedSequence] = []
        slots: list[int] = []
        for index, (num_computed, num_new) in enumerate(lengths):
            num_tokens = num_computed + num_new
            own = tuple(pages.pop() for _ in range(pages_for(num_tokens)))
            own = own if index % 2 else tuple(sorted(own))
            mask_S = None
            if is_padded and index % 2:
                mask_S = torch.arange(num_tokens) >= min(3, num_tokens - 1)
            sequences.append(PackedSequence(own, num_computed, len(slots), len(slots) + num_new, mask_S))
            slots += [own[i // PAGE_TOKENS] * PAGE_TOKENS + i % PAGE_TOKENS for i in range(num_computed, num_tokens)]
        self._fill(sequences)
        return PackedBatch(tuple(sequences), torch.tensor(slots, device=self._device))

    def _fill(self, sequences: Sequence[PackedSequence]) -> None:
        """Write the same pasts into all caches, and large numbers into all other slots."""
        owned = torch.zeros(self._num_pages * PAGE_TOKENS, dtype=torch.bool)
        for each in sequences:
            slots = torch.tensor(each.pages)[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
            owned[slots.flatten()[: each.num_tokens]] = True
        all_slots = torch.arange(len(owned), device=self._device)
        for block in range(2):
            sizes = (self._shape.key_size, self._shape.value_size)
            keys, values = (self._normal(len(owned), self._shape.num_heads, size) for size in sizes)
            for numbers in (keys, values):
                numbers[~owned.to(self._device)] = ELSEWHERE
            for cache in self._caches:
                cache.write(block, all_slots, keys.to(cache.dtype), values.to(cache.dtype))

    def _normal(self, *sizes: int) -> Tensor:
        """Random numbers of the served dtype, in float32: what is rounded before is no error of anyone."""
        numbers = torch.randn(*sizes, generator=self._random)
        return numbers.to(self._dtype).float().to(self._device)


def _named(options: AttentionOptions, batch: PackedBatch) -> str:
    """What was computed, for people."""
    features = sorted(batch.features | options.features)
    return " and ".join(features) or "plain attention"
