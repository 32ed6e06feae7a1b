"""What the blocks of a body keep of a session, found by running them on one token.

Attention keeps keys and values of every token, and some families keep keys of an indexer beside them. Recurrent and
convolutional layers keep states: tensors of one size, however long the sequence is.
"""

# T tokens, H heads of queries, J heads of keys, K size of a key, V size of a value

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from shoal.model.body import Body


@dataclass(frozen=True)
class TensorShape:
    """The sizes and the dtype of a tensor."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class KeyValueShape:
    """What one block caches for one token: the number of heads, and the sizes of a head's key and value in numbers.

    `indexer` is the key of an indexer, if the block has one.
    """

    num_heads: int
    key_size: int
    value_size: int
    indexer: TensorShape | None = None

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token's keys and values in a dtype. For int8 this includes the scales."""
        scales = 2 * self.num_heads * torch.float32.itemsize if dtype == torch.int8 else 0
        index = 0 if self.indexer is None else self.indexer.nbytes
        return self.num_heads * (self.key_size + self.value_size) * dtype.itemsize + scales + index


@dataclass(frozen=True, order=True)
class StateName:
    """A state of a sequence: its block, whether it is of a convolution or recurrent, and its number in the layer."""

    block: int
    is_recurrent: bool
    index: int


@dataclass(frozen=True)
class CacheShapes:
    """What a body keeps: by block for each token, and by state for each sequence."""

    tokens: Mapping[int, KeyValueShape]
    states: Mapping[StateName, TensorShape] = field(default_factory=dict)

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token's keys and values in all blocks, in this dtype."""
        return sum(shape.nbytes(dtype) for shape in self.tokens.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of all states of a sequence."""
        return sum(shape.nbytes for shape in self.states.values())


@torch.inference_mode()
def cache_shapes(body: Body) -> CacheShapes:
    """What the blocks of a body keep."""
    return CacheShapes(_packed_shapes(body)) if body.family.packable else _shapes(body)


def _packed_shapes(body: Body) -> dict[int, KeyValueShape]:
    shapes: dict[int, KeyValueShape] = {}

    def attend(block: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        shapes[block] = KeyValueShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))

    body.forward_packed(_one_token(body)[0], torch.zeros(1, dtype=torch.long), span=body.span, attend=attend)
    return shapes


def _shapes(body: Body) -> CacheShapes:
    cache = body.new_cache()
    body(_one_token(body), cache=cache)
    layers = {block: cache.state.layers[block] for block in body.span}
    tokens = {block: _of_token(layer) for block, layer in layers.items() if _keeps_tokens(layer)}
    states = {name: state for block, layer in layers.items() for name, state in _states(block, layer)}
    return CacheShapes(tokens, states)


def _one_token(body: Body) -> Tensor:
    backbone = body.backbone
    return torch.zeros(1, 1, backbone.config.hidden_size, dtype=backbone.dtype, device=backbone.device)


def _keeps_tokens(layer: Any) -> bool:
    return isinstance(layer, CacheLayerMixin) and layer.is_initialized


def _of_token(layer: Any) -> KeyValueShape:
    keys, values = layer.keys, layer.values
    if keys.shape[1] != values.shape[1]:
        raise ValueError(f"{keys.shape[1]} heads of keys and {values.shape[1]} of values")
    index = getattr(layer, "indexer_keys", None)
    indexer = None if index is None else TensorShape(tuple(index.shape[2:]), index.dtype)
    return KeyValueShape(keys.shape[1], keys.shape[-1], values.shape[-1], indexer)


def _states(block: int, layer: Any) -> Iterator[tuple[StateName, TensorShape]]:
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return
    for is_recurrent, states in ((False, layer.conv_states), (True, layer.recurrent_states)):
        for index, state in states.items():
            if state is not None:
                yield StateName(block, is_recurrent, index), TensorShape(tuple(state.shape[1:]), state.dtype)
