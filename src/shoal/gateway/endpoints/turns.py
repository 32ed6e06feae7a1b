"""The parts of a model's turn: what it says, what it thinks, and which tools it calls.

Models mark them in ways of their own. The response template of a tokenizer describes how; Transformers follows it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from transformers.cli.serving.utils import (
    ReasoningText,
    ToolCall,
    build_response_parser,
    get_response_template,
    response_events_to_chunks,
)

from shoal.gateway.bodies import ChatRequest
from shoal.gateway.error_objects import bad_field
from shoal.gateway.served_model import ServedModel


@dataclass(frozen=True)
class Said:
    """What a piece of text adds to a turn."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()

    def delta(self) -> dict[str, Any]:
        """As OpenAI's delta."""
        found: dict[str, Any] = {}
        if self.content:
            found["content"] = self.content
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.calls:
            found["tool_calls"] = list(self.calls)
        return found


@dataclass
class Turn:
    """Takes a turn apart as its text comes."""

    _parser: Any = None
    _num_calls: int = field(default=0, init=False)

    @classmethod
    def after(cls, served: ServedModel, ids_1S: torch.Tensor, tools: list[dict[str, Any]]) -> Turn:
        """The turn that follows this prompt. Without a response template, all of it is content."""
        return cls(build_response_parser(served.tokenizer, served.model, ids_1S, tools or None))

    @property
    def is_marked(self) -> bool:
        """Whether the text must have its special tokens, which mark the parts."""
        return self._parser is not None

    @property
    def has_calls(self) -> bool:
        """Whether a tool was called, by the model's own choice."""
        return self._num_calls > 0

    def after_text(self, text: str, *, ends: bool) -> Said:
        """What more text says; at the end, also what was open."""
        if self._parser is None:
            return Said(text)
        events = self._parser.feed(text)
        if ends:
            with suppress(ValueError, RuntimeError):  # cut within a tool call, which is nothing then
                events += self._parser.finalize()[1]
        return self._said(response_events_to_chunks(events))

    def _said(self, chunks: list[Any]) -> Said:
        calls = [each for each in chunks if isinstance(each, ToolCall)]
        reasoning = [str(each) for each in chunks if isinstance(each, ReasoningText)]
        content = [each for each in chunks if isinstance(each, str) and not isinstance(each, ReasoningText)]
        first = self._num_calls
        self._num_calls += len(calls)
        return Said(
            "".join(content),
            "".join(reasoning),
            tuple(
                {
                    "index": first + number,
                    "id": f"call_{uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(calls)
            ),
        )


def tools_of(served: ServedModel, request: ChatRequest) -> list[dict[str, Any]]:
    """The tools that a model may call, as chat templates take them.

    Raises `Refused` if the model may choose, and the calls that it makes could not be recognized.
    """
    if not request.tools or request.tool_choice == "none":
        return []
    may_choose = request.tool_choice in (None, "auto")
    if may_choose and get_response_template(served.tokenizer, served.model) is None:
        raise bad_field("tools", f"the model {served.name} has no response template, so its calls cannot be recognized")
    return [tool.model_dump(exclude_none=True) for tool in request.tools]
