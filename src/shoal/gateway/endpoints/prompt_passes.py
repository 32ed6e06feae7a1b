"""Single passes over a text: how likely each of its tokens is, and its mean hidden state.

The caller's event loop waits for the swarm, which may take long and ends with the caller. What follows behind the
blocks is computed in small pieces on threads, one after another for each model, so that other requests get their turns.
"""

# S tokens, R of them at once, V vocabulary, D hidden size

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

import torch

from shoal.client.generation.generation import Token
from shoal.gateway.served_model import ServedModel

T = TypeVar("T")

ROWS_AT_ONCE = 64
"""The tokens whose logits are computed at once: with 256,000 words they take 64 MiB in float32."""


async def prompt_tokens(served: ServedModel, ids_1S: torch.Tensor, num_top: int) -> tuple[Token, ...]:
    """The tokens of a prompt with their log-probabilities after those before them, which the first one has not."""
    ids = ids_1S[0].tolist()
    found = [Token(ids[0])]

    def tokens(outputs_RD: torch.Tensor) -> list[Token]:
        return _tokens(served, outputs_RD, ids[len(found) :], num_top)

    if len(ids) > 1:
        outputs_SD = await _outputs(served, ids_1S[:, :-1])
        async with aclosing(_piece_by_piece(served, outputs_SD, tokens)) as pieces:
            async for piece in pieces:
                found += piece
    return tuple(found)


async def mean_hidden_state(served: ServedModel, ids_1S: torch.Tensor) -> torch.Tensor:
    """The mean [D] of the last hidden states, after the final norm, in float32 on the CPU."""

    def total(outputs_RD: torch.Tensor) -> torch.Tensor:
        return served.ends.hidden_states(served.model, outputs_RD).float().sum(dim=0).cpu()

    outputs_SD = await _outputs(served, ids_1S)
    async with aclosing(_piece_by_piece(served, outputs_SD, total)) as pieces:
        totals = [piece_D async for piece_D in pieces]
    return torch.stack(totals).sum(dim=0) / len(outputs_SD)


async def _outputs(served: ServedModel, ids_1S: torch.Tensor) -> torch.Tensor:
    """What the last block returns for a text, [S, D]."""
    async with served.turns:
        (sends,) = await asyncio.to_thread(
            lambda: served.ends.embed(served.model, [(ids_1S.to(served.model.device), 0)])
        )
    outputs_1TD = await served.model.blocks.computed(sends.hidden_1TD, position_ids=sends.positions_1T)
    found_SD: torch.Tensor = outputs_1TD[0, -ids_1S.shape[1] :]  # a soft prompt may stand before it
    return found_SD


async def _piece_by_piece(
    served: ServedModel, outputs_SD: torch.Tensor, compute: Callable[[torch.Tensor], T]
) -> AsyncGenerator[T, None]:
    for outputs_RD in outputs_SD.split(ROWS_AT_ONCE):
        async with served.turns:
            piece = await asyncio.to_thread(compute, outputs_RD)
        yield piece


@torch.no_grad()
def _tokens(served: ServedModel, outputs_RD: torch.Tensor, ids: list[int], num_top: int) -> list[Token]:
    """The tokens that follow each of these outputs, of which `ids` are the first ones, with their log-probabilities."""
    (logits_RV,) = served.ends.logits(served.model, [(outputs_RD[None], len(outputs_RD))])
    rows_RV = torch.log_softmax(logits_RV, dim=-1)
    top = rows_RV.topk(num_top, dim=-1)
    return [
        Token(token, logprob=float(row_V[token]), top_logprobs=tuple(zip(indices, values, strict=True)))
        for token, row_V, values, indices in zip(
            ids[: len(rows_RV)], rows_RV, top.values.tolist(), top.indices.tolist(), strict=True
        )
    ]
