"""A server's view of a prompt, and how it reads the tokens from that with the public weights.

The server at block k receives the input of block k, one vector for each token. It tries the tokens of the vocabulary at
the first position, computes the blocks before its own for each of them, and takes the token whose vector is nearest to
the one that it received. So it goes on, token by token, behind those that it has read. No training, no guesses about
the text, and no more than the weights, which all members have.
"""

# T tokens of a prompt, C candidates for one position, S tokens that were read before, D hidden size

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from shoal.model.families import find_backbone
from shoal.net.wire.codec import pack_tensor, unpack_tensor
from shoal.tensors import Encoding

AT_ONCE = 256
"""Candidates that are computed in one pass. They see each other's columns of the mask, so more would be slower."""
TRIED_WHOLE = 4096
"""All tokens of a vocabulary up to this size are tried at every position, so that the nearest token is exact."""
CLEARLY_NEAREST = 0.2
"""Of a larger vocabulary, the likeliest tokens are tried first, and no others once one is this near: its distance is
less than this part of the median of those that were tried with it."""

Change = Callable[[Tensor], Tensor]


class Blocks:
    """The blocks [0, `depth`) of a model with the embeddings before them, as one function. Shares the weights."""

    def __init__(self, model: Any, depth: int) -> None:
        _, backbone, layers_name = find_backbone(model, model.config)
        self.depth = depth
        self.embeddings: nn.Module = model.get_input_embeddings()
        self._backbone = copy.copy(backbone)
        self._backbone._modules = dict(backbone._modules)
        layers = list(backbone.get_submodule(layers_name))
        setattr(self._backbone, layers_name, nn.ModuleList(layers[:depth]))
        self._backbone.norm = nn.Identity()

    def __call__(self, inputs_1TD: Tensor, **arguments: Any) -> Tensor:
        """The input of block `depth`, [1, T, D], from that of block 0."""
        if not self.depth:
            return inputs_1TD
        found: Tensor = self._backbone(inputs_embeds=inputs_1TD, **arguments).last_hidden_state
        return found


def sent(hidden: Tensor, wire: Encoding) -> Tensor:
    """What arrives of hidden states that travel in this encoding."""
    return unpack_tensor(*pack_tensor(hidden, wire))


def received(blocks: Blocks, ids_T: Tensor, wire: Encoding, *, change: Change | None = None) -> Tensor:
    """What the server at `blocks.depth` receives, [T, D]: the client sends to block 0, whose server sends to this one.

    `change` is what a client does to the hidden states before it sends them to this server, having computed the blocks
    before by itself.
    """
    embedded = blocks.embeddings(ids_T[None])
    if change is not None:
        return sent(change(blocks(embedded, use_cache=False)), wire)[0].float()
    return sent(blocks(sent(embedded, wire), use_cache=False), wire)[0].float()


class Reader:
    """Reads prompts from hidden states, with the model's public weights in float32, as the server at one block."""

    def __init__(self, model: Any, depth: int) -> None:
        self._model = model
        self._blocks = Blocks(model, depth)
        self._num_tokens = model.get_input_embeddings().num_embeddings

    @torch.inference_mode()
    def read(self, received_TD: Tensor) -> Tensor:
        """The tokens [T] of a prompt."""
        cache, whole = DynamicCache(), DynamicCache()
        found: list[int] = []
        expects = None
        for position, vector_D in enumerate(received_TD):
            token = self._nearest(vector_D, position, cache, expects)
            found.append(token)
            ids_11 = torch.tensor([[token]])
            if self._blocks.depth:
                self._blocks(self._blocks.embeddings(ids_11), past_key_values=cache, use_cache=True)
            if self._num_tokens > TRIED_WHOLE:
                logits = self._model(ids_11, past_key_values=whole, use_cache=True).logits[0, -1]
                expects = logits.float().log_softmax(-1)
        return torch.tensor(found)

    def _nearest(self, vector_D: Tensor, position: int, cache: DynamicCache, expects: Tensor | None) -> int:
        """The token whose vector is nearest. `expects` has the log-probabilities of tokens if not all are tried."""
        order = torch.arange(self._num_tokens) if expects is None else expects.argsort(descending=True)
        nearest, least = 0, float("inf")
        for candidates in order.split(AT_ONCE):
            distances_C = (self._candidates(candidates, position, cache) - vector_D).norm(dim=-1)
            index = int(distances_C.argmin())
            if float(distances_C[index]) < least:
                nearest, least = int(candidates[index]), float(distances_C[index])
            if expects is not None and least < CLEARLY_NEAREST * float(distances_C.median()):
                break
        return nearest

    def _candidates(self, candidates: Tensor, position: int, cache: DynamicCache) -> Tensor:
        """The vectors [C, D] of tokens that might stand at a position, in one pass: each sees what was read and itself.

        They are one sequence with a mask of its own, so that the cache of what was read is there once.
        """
        inputs_1CD = self._blocks.embeddings(candidates[None])
        if not self._blocks.depth:
            return inputs_1CD[0]
        num = len(candidates)
        mask = torch.full((num, position + num), torch.finfo(torch.float32).min)
        mask[:, :position] = 0
        mask[:, position:].fill_diagonal_(0)
        vectors_1CD = self._blocks(
            inputs_1CD,
            attention_mask=mask[None, None],
            position_ids=torch.full((1, num), position),
            past_key_values=cache,
            use_cache=True,
        )
        cache.crop(-num)
        return vectors_1CD[0]
