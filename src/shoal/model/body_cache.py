"""A server's cache of one session for one span: keys and values, or recurrent state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicCache, LinearAttentionCacheLayerMixin

from shoal.errors import UnsupportedOperation
from shoal.spans import Span


class _SpanCache(DynamicCache):  # type: ignore[misc]
    """A cache of the whole model that stores nothing for the blocks outside of a span.

    Blocks keep their numbers, so each layer finds its own entry. Recurrent layers do not count tokens. In a span that
    has no other layers, this class counts them.
    """

    def __init__(self, config: PreTrainedConfig, span: Span) -> None:
        super().__init__(config=config)
        self.layers: list[Any] = [layer if block in span else DummyLayer() for block, layer in enumerate(self.layers)]
        self.num_tokens = 0

    def counts_tokens(self) -> bool:
        return any(isinstance(layer, CacheLayerMixin) for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(super().get_seq_length(layer_idx)) if self.counts_tokens() else self.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self.counts_tokens():
            sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
            return sizes
        return self.num_tokens + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is None and not any(isinstance(la, LinearAttentionCacheLayerMixin) for la in self.layers):
            return self.num_tokens > 0
        return bool(super().has_previous_state(layer_idx, state_idx))


class BodyCache:
    """The state of one session in one span of a body, after `num_tokens` tokens."""

    def __init__(self, config: PreTrainedConfig, span: Span) -> None:
        self.span = span
        self.state = _SpanCache(config, span)

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the cache has."""
        return self.state.num_tokens

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` tokens that the blocks have added."""
        self.state.num_tokens += num_tokens

    def crop(self, num_tokens: int) -> None:
        """Go back to the first `num_tokens` tokens.

        Raises `UnsupportedOperation` and changes nothing if the state cannot be rewound. Recurrent state never can; a
        sliding window cannot once it is full. Raises `ValueError` for more tokens than there are.
        """
        surplus = self.num_tokens - num_tokens
        if surplus < 0 or num_tokens < 0:
            raise ValueError(f"cannot crop {self.num_tokens} tokens to {num_tokens}")
        if surplus == 0:
            return
        for block in self.span:
            layer = self.state.layers[block]
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                raise UnsupportedOperation(f"the recurrent state of block {block} cannot be rewound")
            window = getattr(layer, "sliding_window", None)
            if window is not None and self.num_tokens >= window:
                raise UnsupportedOperation(
                    f"the sliding window of block {block} has dropped tokens that this crop needs"
                )
        self.state.crop(-surplus)
        self.state.num_tokens = num_tokens

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order. A row may be repeated, dropped or moved."""
        self.state.reorder_cache(torch.tensor(rows, dtype=torch.long))
