"""A backend for what it supports, and the reference for the rest: a pass may use both, block by block."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import Tensor

from shoal.server.kv.attention import AttentionBackend, AttentionOptions, PackedBatch, PartialBackend

M = TypeVar("M")


class TwoMetadata(Generic[M]):
    """A pass as both backends describe it. Each describes it when a block first needs it."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch
        self._described: dict[int, Any] = {}

    def of(self, backend: AttentionBackend[M]) -> M:
        """What this backend says of the pass."""
        if id(backend) not in self._described:
            self._described[id(backend)] = backend.metadata(self.batch)
        metadata: M = self._described[id(backend)]
        return metadata


class FeatureFallback:
    """The `AttentionBackend` that asks `partial` wherever it supports what is wanted, and `reference` elsewhere.

    Both work on one cache, and write the same into it.
    """

    def __init__(self, partial: PartialBackend[Any], reference: AttentionBackend[Any]) -> None:
        self._partial = partial
        self._reference = reference

    def metadata(self, batch: PackedBatch) -> TwoMetadata[Any]:
        """Keep the pass for the backend that a block will need."""
        return TwoMetadata(batch)

    def attend(
        self,
        metadata: TwoMetadata[Any],
        block: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        is_supported = metadata.batch.features | options.features <= self._partial.features
        backend = self._partial if is_supported else self._reference
        return backend.attend(metadata.of(backend), block, query, key, value, options)
