"""Single passes over a text: how likely each of its tokens is, and its mean hidden state."""

# S tokens, V vocabulary, D hidden size

from __future__ import annotations

import torch

from shoal.client.generation.generation import Token
from shoal.gateway.served_model import ServedModel

ROWS_AT_ONCE = 64
"""The tokens whose log-probabilities are computed at once."""


@torch.no_grad()
def prompt_tokens(served: ServedModel, ids_1S: torch.Tensor, num_top: int) -> tuple[Token, ...]:
    """The tokens of a prompt with their log-probabilities after those before them, which the first one has not."""
    ids = ids_1S[0].tolist()
    found = [Token(ids[0])]
    if len(ids) == 1:
        return tuple(found)
    logits_SV = served.model(ids_1S, use_cache=False).logits[0, :-1]
    for start in range(0, len(logits_SV), ROWS_AT_ONCE):
        rows_RV = torch.log_softmax(logits_SV[start : start + ROWS_AT_ONCE].float(), dim=-1)
        top = rows_RV.topk(num_top, dim=-1)
        for row_V, values, indices in zip(rows_RV, top.values.tolist(), top.indices.tolist(), strict=True):
            token = ids[len(found)]
            pairs = tuple(zip(indices, values, strict=True))
            found.append(Token(token, logprob=float(row_V[token]), top_logprobs=pairs))
    return tuple(found)


@torch.no_grad()
def mean_hidden_state(served: ServedModel, ids_1S: torch.Tensor) -> torch.Tensor:
    """The mean [D] of the last hidden states, after the final norm."""
    hidden_1SD: torch.Tensor = served.model.base_model(ids_1S, use_cache=False)[0]
    return hidden_1SD[0].float().mean(dim=0)
