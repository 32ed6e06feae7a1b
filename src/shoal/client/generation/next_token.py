"""The next token of each generation, chosen as Transformers' `generate()` chooses it, for all of them at once.

Generations that ask for the same, such as the same temperature, go through Transformers' processors together. What
looks at a text's tokens, such as a repetition penalty, goes through them alone.
"""

# R generations (rows), V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shoal.client.generation.generation import Generation, Token

ALIKE_FOR_ALL = TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper
"""Processors that look at the logits only, each row by itself."""

Rows = tuple[Generation, ...]


def choose_tokens(generations: Sequence[Generation], logits_RV: Tensor) -> list[Token | Exception]:
    """A token for each generation, or why it has none: what its caller passed has failed.

    `logits_RV` are in float32, and may be changed.
    """
    logprobs = [_logprobs(each, row_V) for each, row_V in zip(generations, logits_RV, strict=True)]
    chosen: list[int | Exception] = [0] * len(generations)
    for indices in _groups(generations):
        rows = [generations[index] for index in indices]
        try:
            ids = _choose(rows, logits_RV[list(indices)])
        except Exception as error:  # a processor is the caller's, and must not end the generations of others
            ids = [error] * len(rows)
        for index, found in zip(indices, ids, strict=True):
            chosen[index] = found
    return [
        found if isinstance(found, Exception) else _token(found, known)
        for found, known in zip(chosen, logprobs, strict=True)
    ]


def _groups(generations: Sequence[Generation]) -> list[tuple[int, ...]]:
    """The indices of generations whose logits can go through the same processors together."""
    groups: dict[object, list[int]] = {}
    for index, each in enumerate(generations):
        groups.setdefault(_kind(each, index), []).append(index)
    return [tuple(indices) for indices in groups.values()]


def _kind(generation: Generation, index: int) -> object:
    """Equal for generations whose processors do the same to any logits."""
    processors = generation.processors
    if not all(type(each) in ALIKE_FOR_ALL for each in processors):
        return index
    return generation.samples, tuple((type(each), tuple(sorted(vars(each).items()))) for each in processors)


def _choose(rows: Sequence[Generation], logits_RV: Tensor) -> list[int | Exception]:
    """A token for each of some generations with the same processors."""
    processors: LogitsProcessorList = rows[0].processors
    scores_RV = processors(rows[0].ids_1S, logits_RV)
    if not rows[0].samples:
        return list(scores_RV.argmax(dim=-1).tolist())
    probabilities_RV = torch.softmax(scores_RV, dim=-1)
    return [
        int(torch.multinomial(row_V[None], num_samples=1, generator=each.generator))
        for each, row_V in zip(rows, probabilities_RV, strict=True)
    ]


def _logprobs(generation: Generation, logits_V: Tensor) -> tuple[Tensor, int] | None:
    """The log-probabilities of all tokens, and how many of the likeliest the caller wants; `None` if none."""
    if generation.num_logprobs is None:
        return None
    return torch.log_softmax(logits_V, dim=-1), generation.num_logprobs


def _token(token: int, known: tuple[Tensor, int] | None) -> Token:
    if known is None:
        return Token(token)
    logprobs_V, num_top = known
    top = logprobs_V.topk(num_top)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Token(token, logprob=float(logprobs_V[token]), top_logprobs=tuple(pairs))
