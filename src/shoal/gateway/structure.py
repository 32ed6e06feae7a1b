"""Answers that keep to a grammar: a JSON schema, a regular expression, a choice, or a grammar in Lark's notation.

Tokens that would leave the grammar are impossible. llguidance follows the grammar, and says which tokens may come next.
"""

# S tokens of a text, V vocabulary

from __future__ import annotations

import json
import re
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import LogitsProcessor

from shoal.gateway.bodies import SamplingBody
from shoal.gateway.error_objects import bad_field

JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written in one way: where spaces are free, a weak model may write them for ever."""


def grammar_of(request: SamplingBody, calls: dict[str, Any] | None = None) -> str | None:
    """The grammar that a request asks for, in llguidance's notation; `None` for free text. Raises `Refused`.

    `calls` is the schema of tools that have to be called.
    """
    found = [] if calls is None else [_of_schema(calls, "tools")]
    if (wanted := request.response_format) is not None and wanted.type != "text":
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise bad_field("response_format.json_schema", "json_schema is missing")
        schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
        found.append(_of_schema(schema, "response_format.json_schema.schema"))
    if (kept := request.structured_outputs) is not None:
        if kept.json_ is not None:
            found.append(_of_schema(kept.json_, "structured_outputs.json"))
        if kept.regex is not None:
            found.append(_checked(LLMatcher.grammar_from_regex(kept.regex), "structured_outputs.regex"))
        if kept.choice is not None:
            pattern = "|".join(map(re.escape, kept.choice))
            found.append(_checked(LLMatcher.grammar_from_regex(pattern), "structured_outputs.choice"))
        if kept.grammar is not None:
            found.append(_checked(LLMatcher.grammar_from_lark(kept.grammar), "structured_outputs.grammar"))
    if len(found) > 1:
        raise bad_field("structured_outputs", "an answer can keep to one grammar only")
    return found[0] if found else None


def _of_schema(schema: dict[str, Any], param: str) -> str:
    try:
        return _checked(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_OPTIONS), param)
    except ValueError as error:
        raise bad_field(param, str(error).splitlines()[0]) from None


def _checked(grammar: str, param: str) -> str:
    if problem := LLMatcher.validate_grammar(grammar, None):
        raise bad_field(param, problem.splitlines()[0])
    return grammar


def grammar_tokenizer(tokenizer: Any, end_tokens: list[int]) -> LLTokenizer:
    """What llguidance needs of a tokenizer. It takes about a second."""
    return from_tokenizer(tokenizer, eos_token=end_tokens or None)


class KeepsToGrammar(LogitsProcessor):  # type: ignore[misc]
    """Allows only the tokens with which one answer still keeps to a grammar. It follows one answer."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, *, num_prompt_tokens: int) -> None:
        self._matcher = LLMatcher(tokenizer, grammar)
        self._ends = list(tokenizer.eos_tokens)
        self._num_seen = num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids[0, self._num_seen :].tolist()
        self._num_seen = input_ids.shape[1]
        if new and not self._matcher.consume_tokens(new):
            raise ValueError(f"the answer has left its grammar: {self._matcher.get_error()}")
        forbidden_V = torch.ones(scores.shape[1], dtype=torch.bool)
        if self._matcher.is_stopped():
            forbidden_V[self._ends] = False
        else:
            allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
            num_known = min(len(allowed), len(forbidden_V))
            forbidden_V[:num_known] = allowed[:num_known] == 0
        if bool(forbidden_V.all()):
            raise ValueError(f"no token can follow in this grammar: {self._matcher.get_error()}")
        return scores.masked_fill(forbidden_V.to(scores.device), float("-inf"))
