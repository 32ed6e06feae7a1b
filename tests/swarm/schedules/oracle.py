"""The tiny model: in one piece, which gives the expected results, and in spans, which the servers of all swarms use."""

# B sequences, S all tokens, D hidden size, V vocabulary

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.model.body import Body, build_body
from shoal.model.families import family_of
from shoal.peers import ModelInfo
from shoal.server.kv.cache_shapes import CacheShapes, cache_shapes
from shoal.spans import Span

from ..tiny_models import tiny_config, tiny_model

NUM_BLOCKS = 4
MAX_LENGTH = 512
MODEL = ModelInfo(key="t" * 16, name="tiny", family="llama", num_blocks=NUM_BLOCKS)
FINGERPRINT = "f" * 64


class Oracle:
    """A Llama of a few blocks, whose weights have this `spread`. Results are computed once for equal inputs.

    `changes` are those of the tiny model's config.
    """

    def __init__(
        self, model: ModelInfo = MODEL, max_length: int = MAX_LENGTH, *, spread: float = 0.4, **changes: Any
    ) -> None:
        self.model = model
        self.max_length = max_length
        lengths = {"num_hidden_layers": model.num_blocks, "max_position_embeddings": max_length}
        self._config = tiny_config("llama", **lengths, initializer_range=spread, **changes)
        self._whole: PreTrainedModel = tiny_model(self._config).requires_grad_(False)
        self._logits: dict[tuple[bytes, ...], Tensor] = {}
        self._gradients: dict[tuple[bytes, ...], Tensor] = {}
        self.hidden_size = self._config.hidden_size
        self.vocabulary = self._config.vocab_size

    @functools.cache  # noqa: B019 - there is one oracle
    def body(self, span: Span) -> Body:
        family = family_of(self._config)
        return build_body(family, self._config, span, self._whole.state_dict(), dtype=torch.float32)

    @functools.cache  # noqa: B019
    def shapes(self, span: Span) -> CacheShapes:
        return cache_shapes(self.body(span))

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The inputs [B, T, D] that a client sends into the blocks."""
        embedded: Tensor = self._whole.get_input_embeddings()(ids_BT)
        return embedded

    def head(self, hidden_BTD: Tensor) -> Tensor:
        """The logits [B, T, V] that a client computes from the outputs of the blocks."""
        logits: Tensor = self._whole.lm_head(self._whole.model.norm(hidden_BTD))
        return logits

    @torch.no_grad()
    def logits(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """The logits [B, S, V] of the model in one piece."""
        key = _key(ids_BS, mask_BS)
        if key not in self._logits:
            output = self._whole(ids_BS, attention_mask=mask_BS, position_ids=positions_of(mask_BS), use_cache=False)
            self._logits[key] = output.logits
        return self._logits[key]

    def gradient(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """The gradient [B, S, D] of `loss` with respect to the embeddings, through the model in one piece."""
        key = _key(ids_BS, mask_BS)
        if key not in self._gradients:
            inputs = self.embed(ids_BS).requires_grad_(True)
            positions = positions_of(mask_BS)
            output = self._whole(inputs_embeds=inputs, attention_mask=mask_BS, position_ids=positions, use_cache=False)
            (self._gradients[key],) = torch.autograd.grad(loss(output.logits, mask_BS), inputs)
        return self._gradients[key]


def loss(logits_BSV: Tensor, mask_BS: Tensor) -> Tensor:
    """Something to differentiate, over all tokens that are not padding."""
    return (logits_BSV * mask_BS[..., None]).square().mean()


def positions_of(mask_BS: Tensor) -> Tensor:
    return (mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)


def _key(*tensors: Tensor) -> tuple[bytes, ...]:
    return tuple(part for tensor in tensors for part in (str(tensor.shape).encode(), tensor.numpy().tobytes()))


@functools.cache
def oracle() -> Oracle:
    return Oracle()
