"""The paged cache as Transformers' layers see it during a pass over a batch of sequences.

Layers expect one tensor of keys for a batch, as if its sequences were padded on the left. So they get a copy of each
sequence's keys, the last token of all in the last column; an attention mask hides the columns before a sequence:

    column      0 ................................. S
    sequence 0            | computed before | new |
    sequence 1  |      computed before      | new |

New keys and values go into pages at once. States are copied from their slots when a block begins, and go back with
`commit`, after the whole pass: a pass that fails leaves them as they were.
"""

# G sequences, T new tokens of each, S columns, J heads of keys, K size of a key

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from shoal.server.kv.cache_shapes import StateName
from shoal.server.kv.paged_cache import PagedCache
from shoal.spans import Span


@dataclass(frozen=True)
class Columns:
    """Where the tokens of a batch are in the cache: the slots of all columns, and those of the new tokens.

    `num_computed` is how many tokens of the longest sequence were computed before. Columns before a sequence have the
    slot of one of its tokens. `state_slots` are by sequence, and empty if the body keeps no states.
    """

    slots_GS: Tensor
    new_slots_GT: Tensor
    num_computed: int
    state_slots: tuple[int, ...]
    _by_heads: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def vectors(self, num_heads: int) -> Tensor:
        """The numbers [G, J, S] of the columns' vectors in pages of `num_heads` heads."""
        if num_heads not in self._by_heads:
            heads_J1 = torch.arange(num_heads, device=self.slots_GS.device)[:, None]
            self._by_heads[num_heads] = self.slots_GS[:, None] * num_heads + heads_J1
        return self._by_heads[num_heads]


class BatchCache(Cache):  # type: ignore[misc]
    """The cache of one batch in the blocks of a span.

    It also counts tokens in a span of recurrent blocks alone, which Transformers' cache does not.
    """

    def __init__(self, cache: PagedCache, columns: Columns, span: Span, num_blocks: int) -> None:
        self.columns = columns
        self._states = cache.states
        layers = [_layer(self, cache, block) if block in span else DummyLayer() for block in range(num_blocks)]
        super().__init__(layers=layers)

    def commit(self) -> None:
        """Write the states into their slots."""
        for layer in self.layers:
            if isinstance(layer, _StateLayer):
                layer.commit(self._states, self.columns.state_slots)

    @property
    def is_linear(self) -> list[bool]:
        """Whether a block keeps nothing but states."""
        return [isinstance(layer, _StateLayer) and not isinstance(layer, _TokenLayer) for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        layer = self.layers[layer_idx]
        return layer.get_seq_length() if isinstance(layer, _TokenLayer) else self.columns.num_computed

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns.num_computed + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is None and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers):
            return self.columns.num_computed > 0
        return bool(super().has_previous_state(layer_idx, state_idx))


def _layer(owner: BatchCache, cache: PagedCache, block: int) -> Any:
    shapes = cache.shapes
    names = [name for name in shapes.states if name.block == block]
    if block in shapes.tokens and names:
        return _TokenAndStateLayer(owner, cache, block, names)
    if names:
        return _StateLayer(owner, cache, block, names)
    return _TokenLayer(owner, cache, block) if block in shapes.tokens else DummyLayer()


class _TokenLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of a block, in pages."""

    is_sliding = False
    is_croppable = False

    def __init__(self, owner: BatchCache, cache: PagedCache, block: int) -> None:
        self._owner, self._cache, self._block = owner, cache, block
        self._num_new = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Pages are there already."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values [G, J, T, K]; returns those of all columns [G, J, S, K]."""
        columns = self._owner.columns
        self._num_new = key_states.shape[2]
        self._cache.write(
            self._block,
            columns.new_slots_GT.flatten(),
            key_states.transpose(1, 2).flatten(0, 1),
            value_states.transpose(1, 2).flatten(0, 1),
        )
        if not columns.num_computed:
            return key_states, value_states
        return self._cache.select(self._block, columns.vectors(key_states.shape[1]))

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Store the indexer's new keys [G, T, K]; returns those of all columns [G, S, K]."""
        columns = self._owner.columns
        self._cache.write_index(self._block, columns.new_slots_GT.flatten(), indexer_key_states.flatten(0, 1))
        return self._cache.select_index(self._block, columns.slots_GS)

    def get_seq_length(self) -> int:
        return self._owner.columns.num_computed + self._num_new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.columns.num_computed + query_length, 0

    def get_max_length(self) -> int:
        return -1


class _StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """States of a block, copied from their slots."""

    def __init__(self, owner: BatchCache, cache: PagedCache, block: int, names: Sequence[StateName]) -> None:
        super().__init__(number_of_states=1 + max(name.index for name in names))
        self._names = names
        columns = owner.columns
        if not columns.num_computed:
            return
        for name in names:
            state = cache.states.read(name, columns.state_slots)
            self.device = state.device
            if name.is_recurrent:
                self.recurrent_states[name.index] = state
                self.is_recurrent_states_initialized[name.index] = True
            else:
                self.dtype = state.dtype
                self.conv_states[name.index] = state
                self.is_conv_states_initialized[name.index] = True
                self.conv_kernel_size[name.index] = state.shape[-1]
            self.has_previous_state[name.index] = True

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the new state. It is not copied: this layer owns it until `commit`."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def commit(self, states: Any, slots: Sequence[int]) -> None:
        """Write the states into the slots of their sequences."""
        for name in self._names:
            of_kind = self.recurrent_states if name.is_recurrent else self.conv_states
            states.write(name, slots, of_kind[name.index])


class _TokenAndStateLayer(_StateLayer, _TokenLayer):
    """Both, for blocks with attention beside a recurrent or convolutional layer."""

    def __init__(self, owner: BatchCache, cache: PagedCache, block: int, names: Sequence[StateName]) -> None:
        _TokenLayer.__init__(self, owner, cache, block)
        _StateLayer.__init__(self, owner, cache, block, names)

    def lazy_initialization(self, *args: Any, **options: Any) -> None:
        """States only: pages are there already."""
        if not args:
            _StateLayer.lazy_initialization(self, **options)

    def get_max_length(self) -> int:
        return -1
