"""What a request says about choosing tokens, as options of `model.stream`."""

# S tokens of a text, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from shoal.gateway.bodies import SamplingBody
from shoal.gateway.error_objects import bad_field
from shoal.gateway.served_model import ServedModel
from shoal.gateway.structure import KeepsToGrammar, grammar_of

GREEDY_BELOW = 1e-5
"""Temperatures below this one choose the likeliest token, as in vLLM: logits that are divided by them overflow."""


class LogitBias(LogitsProcessor):  # type: ignore[misc]
    """Adds a number to the logits of some tokens."""

    def __init__(self, biases: dict[int, float]) -> None:
        self._ids = torch.tensor(list(biases), dtype=torch.long)
        self._values = torch.tensor(list(biases.values()))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, self._ids.to(scores.device), self._values.to(scores)[None].expand(len(scores), -1))


class OccurrencePenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's penalties: for tokens that the answer has already, `presence` once and `frequency` for each time."""

    def __init__(self, num_prompt_tokens: int, *, presence: float, frequency: float) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answers_BN = input_ids[:, self._num_prompt_tokens :]
        counts_BV = torch.zeros_like(scores).scatter_add_(
            1, answers_BN, torch.ones_like(answers_BN, dtype=scores.dtype)
        )
        return scores - self._frequency * counts_BV - self._presence * (counts_BV > 0).to(scores)


def stream_options(
    request: SamplingBody,
    served: ServedModel,
    *,
    num_prompt_tokens: int,
    index: int,
    calls: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Options for the answer number `index` of a request. `calls` is the schema of tools that have to be called.

    What a request leaves out is what the model's own `generation_config.json` says, or else OpenAI's default: tokens
    are drawn from the whole distribution, at temperature 1.
    """
    own = served.model.generation_config
    temperature = _first(request.temperature, own.temperature, 1.0)
    processors: list[LogitsProcessor] = []
    if request.logit_bias:
        served.check_known(request.logit_bias, param="logit_bias")
        processors.append(LogitBias(request.logit_bias))
    if request.presence_penalty or request.frequency_penalty:
        processors.append(
            OccurrencePenalty(
                num_prompt_tokens,
                presence=request.presence_penalty or 0.0,
                frequency=request.frequency_penalty or 0.0,
            )
        )
    if (grammar := grammar_of(request, calls)) is not None:
        if request.ignore_eos:
            raise bad_field("ignore_eos", "an answer that keeps to a grammar ends with it")
        processors.append(KeepsToGrammar(served.for_grammars, grammar, num_prompt_tokens=num_prompt_tokens))
    options: dict[str, Any] = {
        "logits_processor": processors,
        "repetition_penalty": _first(request.repetition_penalty, own.repetition_penalty, 1.0),
        "seed": None if request.seed is None else (request.seed + index) % (1 << 63),
        "num_beams": 1,
    }
    if request.ignore_eos:
        options |= {"eos_token_id": [], "pad_token_id": 0}  # one text needs no padding, but generate() wants a token
    if temperature < GREEDY_BELOW:
        return options | {"do_sample": False}
    return options | {
        "do_sample": True,
        "temperature": float(temperature),
        "top_p": _first(request.top_p, own.top_p, 1.0),
        "top_k": max(0, _first(request.top_k, own.top_k, 0)),
        "min_p": _first(request.min_p, own.min_p, None),
    }


def _first(*values: Any) -> Any:
    """The first that is not `None`."""
    return next((value for value in values if value is not None), None)
