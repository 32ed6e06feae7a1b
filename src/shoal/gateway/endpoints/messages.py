"""`POST /v1/messages`: a chat in the form of Anthropic's API."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar
from uuid import uuid4

from shoal.gateway.bodies import ChatRequest, MessagesRequest, PromptBody
from shoal.gateway.endpoints.chat_completions import ChatAnswer
from shoal.gateway.endpoints.turns import Said, tools_of
from shoal.gateway.error_objects import Refused, bad_field
from shoal.gateway.replies import Asker, Piece, Usage, together, whole_answers
from shoal.gateway.served_model import ServedModel


def num_prompt_tokens(served: ServedModel, request: PromptBody) -> int:
    """How many tokens a prompt has."""
    chat = _as_chat(request)
    return served.ids_of_chat(chat.messages, tools_of(served, chat), chat.chat_template_kwargs).shape[1]


class MessagesAnswer:
    """The answer to one request: `whole` at once, or `chunks`, which are events, as they come."""

    events_are_named: ClassVar[bool] = True

    def __init__(self, served: ServedModel, request: MessagesRequest, *, asker: Asker) -> None:
        self._request = request
        self._id = f"msg_{uuid4().hex}"
        self._chat = ChatAnswer(served, _as_chat(request), asker=asker)

    @property
    def usages(self) -> list[Usage]:
        """The tokens of each of its answers, as far as it has come."""
        return self._chat.usages

    def failure(self, error: Refused) -> dict[str, Any]:
        """The last event of a stream that fails."""
        return error.anthropic_body()

    async def whole(self) -> dict[str, Any]:
        """Anthropic's `Message`."""
        (answer,) = await whole_answers(self._chat.inputs, self.usages)
        blocks = _Blocks()
        blocks.add(self._chat.turns[0].after_text(answer.text, ends=True))
        return self._message(blocks.blocks) | blocks.ending(answer) | {"usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Anthropic's stream events."""
        blocks, turn = _Blocks(), self._chat.turns[0]
        async with aclosing(together(self._chat.inputs, self.usages)) as pieces:
            _, piece = await anext(pieces)  # an answer that cannot begin fails before anything is said
            yield {"type": "message_start", "message": self._message([]) | {"usage": self._usage()}}
            while True:
                for event in blocks.add(turn.after_text(piece.text, ends=piece.finish_reason is not None)):
                    yield event
                if piece.finish_reason is not None:
                    break
                _, piece = await anext(pieces)
        for event in blocks.end():
            yield event
        yield {"type": "message_delta", "delta": blocks.ending(piece), "usage": self._usage()}
        yield {"type": "message_stop"}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _usage(self) -> dict[str, int]:
        (usage,) = self.usages
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
        }


def _as_chat(request: PromptBody) -> ChatRequest:
    if request.messages[-1].role != "user":
        raise bad_field("messages", "the last message must be the user's: beginnings of answers are not supported")
    return ChatRequest.model_validate(request.as_chat())


class _Blocks:
    """The blocks of an answer as they grow, and the events that tell of it."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._open: str | None = None
        """The type of the last block, while it grows."""

    def add(self, said: Said) -> list[dict[str, Any]]:
        """More of the turn."""
        events: list[dict[str, Any]] = []
        if said.reasoning:
            events += self._grow({"type": "thinking", "thinking": "", "signature": ""}, said.reasoning)
        if said.content:
            events += self._grow({"type": "text", "text": "", "citations": None}, said.content)
        for call in said.calls:
            function = call["function"]
            events += self.end()
            events += self._begin({"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}})
            events.append(self._delta({"type": "input_json_delta", "partial_json": function["arguments"]}))
            self.blocks[-1]["input"] = json.loads(function["arguments"] or "{}")
            events += self.end()
        return events

    def end(self) -> list[dict[str, Any]]:
        """The last block is complete."""
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": len(self.blocks) - 1}]

    def ending(self, last: Piece) -> dict[str, Any]:
        """Why the answer ends."""
        if last.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if last.stop_text is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_text}
        called = any(block["type"] == "tool_use" for block in self.blocks)
        return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}

    def _grow(self, empty: dict[str, Any], text: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        kind = empty["type"]
        if self._open != kind:
            events += self.end()
            events += self._begin(empty)
        self.blocks[-1][kind] += text
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def _begin(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        self.blocks.append(block)
        self._open = block["type"]
        return [{"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}
