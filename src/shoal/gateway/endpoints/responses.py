"""`POST /v1/responses`: a chat in the form of OpenAI's newer API.

Nothing is stored: each request has the whole input.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar
from uuid import uuid4

from shoal.gateway.bodies import ChatRequest, FlatNamedTool, ResponsesRequest
from shoal.gateway.endpoints.chat_completions import ChatAnswer
from shoal.gateway.endpoints.forced_calls import ForcedCalls
from shoal.gateway.endpoints.turns import Said, Turn
from shoal.gateway.error_objects import Refused
from shoal.gateway.replies import Asker, GenerationInputs, Usage, together, whole_answers
from shoal.gateway.served_model import ServedModel


class ResponsesAnswer:
    """The answer to one request: `whole` at once, or `chunks`, which are events, as they come."""

    events_are_named: ClassVar[bool] = True

    def __init__(self, served: ServedModel, request: ResponsesRequest, *, asker: Asker) -> None:
        self._request = request
        self._id = f"resp_{uuid4().hex}"
        self._created = int(time.time())
        self._chat = ChatAnswer(served, ChatRequest.model_validate(request.as_chat()), asker=asker)

    @property
    def inputs(self) -> list[GenerationInputs]:
        """What is generated for it."""
        return self._chat.inputs

    @property
    def usages(self) -> list[Usage]:
        """The tokens of each of its answers, as far as it has come."""
        return self._chat.usages

    def failure(self, error: Refused) -> dict[str, Any]:
        """The last event of a stream that fails."""
        return {"type": "error", **error.body()["error"]}

    @property
    def _turn(self) -> Turn | ForcedCalls:
        return self._chat.turns[0]

    async def whole(self) -> dict[str, Any]:
        """OpenAI's `Response`."""
        (answer,) = await whole_answers(self.inputs, self.usages)
        output = _Output()
        output.add(self._turn.after_text(answer.text, ends=True))
        output.end()
        return self._object(output, answer.finish_reason)

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """OpenAI's `ResponseStreamEvent`s."""
        output, number = _Output(), 0
        reason: str | None = None

        def numbered(event: dict[str, Any]) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {**event, "sequence_number": number - 1}

        async with aclosing(together(self.inputs, self.usages)) as pieces:
            _, piece = await anext(pieces)  # an answer that cannot begin fails before anything is said
            for kind in ("response.created", "response.in_progress"):
                yield numbered({"type": kind, "response": self._object(output, None)})
            while True:
                reason = piece.finish_reason
                said = self._turn.after_text(piece.text, ends=reason is not None)
                for event in output.add(said):
                    yield numbered(event)
                if reason is not None:
                    break
                _, piece = await anext(pieces)
        for event in output.end():
            yield numbered(event)
        kind = "response.incomplete" if reason == "length" else "response.completed"
        yield numbered({"type": kind, "response": self._object(output, reason)})

    def _object(self, output: _Output, reason: str | None) -> dict[str, Any]:
        request, usage = self._request, self.usages[0]
        status = {None: "in_progress", "length": "incomplete"}.get(reason, "completed")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": request.model,
            "output": output.items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"} if request.text is None else request.text.described()},
            "tool_choice": _described(request.tool_choice),
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None if reason is None else _usage(usage),
            "user": request.user,
            "metadata": request.metadata or {},
        }


def _described(choice: str | FlatNamedTool | None) -> Any:
    return choice.model_dump() if isinstance(choice, FlatNamedTool) else choice or "auto"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class _Output:
    """The items of an answer as they grow, and the events that tell of it."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: str | None = None
        """The type of the last item, while it grows."""

    def add(self, said: Said) -> list[dict[str, Any]]:
        """More of the turn."""
        events: list[dict[str, Any]] = []
        if said.reasoning:
            events += self._grow("reasoning", said.reasoning)
        if said.content:
            events += self._grow("message", said.content)
        for call in said.calls:
            events += self.end()
            events += self._call(call)
        return events

    def end(self) -> list[dict[str, Any]]:
        """The last item is complete."""
        if self._open is None:
            return []
        item, at = self.items[-1], len(self.items) - 1
        item["status"] = "completed"
        part = item["content"][0]
        place = {"item_id": item["id"], "output_index": at, "content_index": 0}
        kind, self._open = self._open, None
        if kind == "reasoning":
            done = {"type": "response.reasoning_text.done", **place, "text": part["text"]}
        else:
            done = {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []}
        return [
            done,
            {"type": "response.content_part.done", **place, "part": part},
            {"type": "response.output_item.done", "output_index": at, "item": item},
        ]

    def _grow(self, kind: str, text: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if self._open != kind:
            events += self.end()
            events += self._begin(kind)
        item, at = self.items[-1], len(self.items) - 1
        item["content"][0]["text"] += text
        place = {"item_id": item["id"], "output_index": at, "content_index": 0, "delta": text}
        if kind == "reasoning":
            return [*events, {"type": "response.reasoning_text.delta", **place}]
        return [*events, {"type": "response.output_text.delta", **place, "logprobs": []}]

    def _begin(self, kind: str) -> list[dict[str, Any]]:
        at = len(self.items)
        if kind == "reasoning":
            item: dict[str, Any] = {"id": f"rs_{uuid4().hex}", "type": kind, "summary": []}
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": f"msg_{uuid4().hex}", "type": kind, "role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item |= {"status": "in_progress", "content": []}
        events = [{"type": "response.output_item.added", "output_index": at, "item": {**item}}]
        events.append(
            {
                "type": "response.content_part.added",
                "item_id": item["id"],
                "output_index": at,
                "content_index": 0,
                "part": {**part},
            }
        )
        item["content"] = [part]
        self.items.append(item)
        self._open = kind
        return events

    def _call(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        at, function = len(self.items), call["function"]
        item = {
            "id": f"fc_{uuid4().hex}",
            "type": "function_call",
            "call_id": call["id"],
            "name": function["name"],
            "arguments": function["arguments"],
            "status": "completed",
        }
        self.items.append(item)
        place = {"item_id": item["id"], "output_index": at}
        return [
            {
                "type": "response.output_item.added",
                "output_index": at,
                "item": {**item, "arguments": "", "status": "in_progress"},
            },
            {"type": "response.function_call_arguments.delta", **place, "delta": item["arguments"]},
            {
                "type": "response.function_call_arguments.done",
                **place,
                "arguments": item["arguments"],
                "name": item["name"],
            },
            {"type": "response.output_item.done", "output_index": at, "item": item},
        ]
