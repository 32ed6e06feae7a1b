"""The output head on a server: the final norm, and the projection to logits of the tokens that clients ask for.

It is Transformers' own model of the family, with the hidden states of the last block in place of its blocks. The server
returns what the projection returns. Some families then cap or scale the logits: the client does that, with the same
Transformers code.
"""

# B sequences, T new tokens, N tokens of all sessions, D hidden size, V vocabulary, K likeliest tokens

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from shoal.errors import UnsupportedModel
from shoal.model.families import text_config
from shoal.model.head import build_head
from shoal.model.linear.packed_linear import pack_linears
from shoal.model.weights.checkpoint import Checkpoint
from shoal.server.kv.batch import Chunk
from shoal.tensors import TensorName

Answer = Mapping[TensorName, torch.Tensor]
"""The tensors that answer a step, by name: hidden states, or logits."""
ROWS_OF_PRODUCT = 256
"""The most rows of one product: enough for any processor to be busy, and few enough to need little memory."""


class ServerHead:
    """From hidden states [N, D] after the last block to logits [N, V], in the dtype of the blocks.

    `vocabulary` is V, the number of logits of a token.
    """

    def __init__(self, model: PreTrainedModel, blocks: _GivenBlocks) -> None:
        self._model = model.eval().requires_grad_(False)
        self._blocks = blocks
        self.vocabulary = int(self(torch.zeros(1, model.config.hidden_size)).shape[1])

    @torch.inference_mode()
    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The logits [N, V]. It is called on the compute thread."""
        return torch.cat([self._project(rows) for rows in hidden_ND.split(ROWS_OF_PRODUCT)])

    def _project(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def take(_: nn.Module, __: Any, logits: torch.Tensor) -> None:
            found.append(logits)

        self._blocks.hidden_N1D = hidden_ND.to(self._model.device, self._model.dtype)[:, None]
        hook = self._model.get_output_embeddings().register_forward_hook(take)
        try:
            # Each token is a sequence of its own: models with few positions refuse long sequences.
            ids_N1 = torch.zeros(len(hidden_ND), 1, dtype=torch.int64, device=self._model.device)
            self._model(input_ids=ids_N1, use_cache=False)
        finally:
            hook.remove()
            self._blocks.hidden_N1D = None
        return found[0][:, 0]


class _GivenBlocks(nn.Module):
    """Stands in for the blocks, and returns their outputs, which are known already."""

    hidden_N1D: torch.Tensor | None = None

    def forward(self, _: torch.Tensor, **__: Any) -> torch.Tensor:
        assert self.hidden_N1D is not None
        return self.hidden_N1D


class _NoEmbeddings(nn.Module):
    """Stands in for the embeddings, whose values are not used, so they are neither read from disk nor moved."""

    def __init__(self, size: int, like: torch.Tensor) -> None:
        super().__init__()
        # Some models ask their embeddings for their device and dtype.
        self.register_buffer("weight", torch.zeros(1, size, dtype=like.dtype), persistent=False)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.get_buffer("weight")
        return weight.new_zeros(*ids_BT.shape, weight.shape[1])


def load_head(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> ServerHead:
    """Load the head of a checkpoint. Raises `UnsupportedModel` for a model without one that a server can hold."""
    config = text_config(checkpoint.config)
    blocks = _GivenBlocks()
    model = build_head(
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)],
        checkpoint.family,
        config,
        checkpoint.head_tensors(),
        blocks=blocks,
        dtype=dtype,
    )
    embeddings = model.get_input_embeddings()
    if not isinstance(model.get_output_embeddings(), nn.Module) or not isinstance(embeddings, nn.Embedding):
        raise UnsupportedModel(f"{config.model_type!r} has no output head that a server could hold")
    model.set_input_embeddings(_NoEmbeddings(embeddings.embedding_dim, embeddings.weight))
    del embeddings
    model.to(device)
    pack_linears(model)
    return ServerHead(model, blocks)


def answers_of(
    head: ServerHead | None, outputs: Sequence[torch.Tensor | Exception], chunks: Sequence[Chunk]
) -> list[Answer | Exception]:
    """The answers to chunks with these outputs [B, T, D], in the dtypes of the chunks' inputs and on the CPU.

    The logits that several clients ask for are computed together, so that the head's weights are read once. If the head
    fails, only the chunks that ask for logits fail. Raises `torch.OutOfMemoryError` if the device has no memory for it.
    """
    answers: list[Answer | Exception] = []
    for_head: dict[int, torch.Tensor] = {}
    for index, (output, chunk) in enumerate(zip(outputs, chunks, strict=True)):
        if isinstance(output, Exception):
            answers.append(output)
            continue
        answers.append({} if chunk.wanted else {"hidden": output.to(chunk.hidden_BTD)})
        if chunk.wanted and chunk.wanted.num_tokens:
            for_head[index] = output[:, -chunk.wanted.num_tokens :].flatten(0, 1)
    if not for_head:
        return answers
    assert head is not None, "the validator refuses such a step where there is no head"
    try:
        logits_NV = head(torch.cat(list(for_head.values())))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return [error if index in for_head else answer for index, answer in enumerate(answers)]
    for index, logits in zip(for_head, logits_NV.split([len(rows) for rows in for_head.values()]), strict=True):
        answers[index] = _answer(logits, chunks[index])
    return answers


def _answer(logits_NV: torch.Tensor, chunk: Chunk) -> Answer:
    assert chunk.wanted is not None
    logits_BTV, top_k = logits_NV.view(-1, chunk.wanted.num_tokens, logits_NV.shape[1]), chunk.wanted.top_k
    if top_k is None:
        return {"logits": logits_BTV.to(chunk.hidden_BTD)}
    if top_k == 1:  # argmax returns the first of equal logits, as it does on one machine; topk need not
        ids_BTK = logits_BTV.argmax(dim=-1, keepdim=True)
        best_BTK = logits_BTV.gather(-1, ids_BTK)
    else:
        best_BTK, ids_BTK = logits_BTV.topk(top_k, dim=-1)
    return {"logits": best_BTK.to(chunk.hidden_BTD), "ids": ids_BTK.cpu()}


def joined(pieces: Sequence[Answer]) -> Answer:
    """The answer to a step that was computed in several chunks."""
    if len(pieces) == 1:
        return pieces[0]
    names = dict.fromkeys(itertools.chain.from_iterable(pieces))
    return {name: torch.cat([piece[name] for piece in pieces if name in piece], dim=1) for name in names}
