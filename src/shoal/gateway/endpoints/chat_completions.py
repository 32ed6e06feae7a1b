"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from shoal.client.generation.drafting.ngram_drafter import NgramDrafter
from shoal.client.generation.generation import Token
from shoal.gateway.bodies import ChatRequest
from shoal.gateway.endpoints.forced_calls import ForcedCalls
from shoal.gateway.endpoints.openai_answer import OpenAIAnswer
from shoal.gateway.endpoints.turns import Said, Turn, tools_of
from shoal.gateway.replies import Asker, GenerationInputs, Piece, Usage, together, whole_answers
from shoal.gateway.served_model import ServedModel
from shoal.gateway.token_options import stream_options


class ChatAnswer(OpenAIAnswer):
    """The answers to one request: `whole` at once, or `chunks` as they come."""

    def __init__(self, served: ServedModel, request: ChatRequest, *, asker: Asker) -> None:
        super().__init__("chatcmpl", request)
        self._served = served
        self._request = request
        tools = tools_of(served, request)
        ids_1S = served.ids_of_chat(request.messages, tools, request.chat_template_kwargs)
        num_prompt = ids_1S.shape[1]
        forced = ForcedCalls.of(request)
        self.turns = [
            Turn.after(served, ids_1S, tools) if forced is None else replace(forced) for _ in range(request.n or 1)
        ]
        schema = None if forced is None else forced.schema
        most = served.most_new_tokens(num_prompt, request.most_tokens, param="max_tokens")
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        predicted = [] if request.prediction is None else served.ids_of_prediction(request.prediction.text)
        self.inputs = [
            GenerationInputs(
                served,
                ids_1S,
                asker,
                stream_options(request, served, num_prompt_tokens=num_prompt, index=index, calls=schema)
                | {"max_new_tokens": most, "num_logprobs": num_logprobs}
                | ({"draft": NgramDrafter(predicted)} if predicted else {}),
                request.stop_texts,
                with_special=turn.is_marked,
            )
            for index, turn in enumerate(self.turns)
        ]
        self.usages = [Usage(num_prompt) for _ in self.inputs]

    async def whole(self) -> dict[str, Any]:
        """OpenAI's `ChatCompletion`."""
        answers = await whole_answers(self.inputs, self.usages)
        choices = [
            {
                "index": index,
                "message": _message(turn.after_text(answer.text, ends=True)),
                "logprobs": self._logprobs(answer.tokens),
                "finish_reason": _reason(answer, turn),
            }
            for index, (answer, turn) in enumerate(zip(answers, self.turns, strict=True))
        ]
        return self._object("chat.completion", choices) | {"usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """OpenAI's `ChatCompletionChunk`s."""
        async with aclosing(together(self.inputs, self.usages)) as pieces:
            first = await anext(pieces)  # an answer that cannot begin fails before anything is said
            for index in range(len(self.inputs)):
                yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None}) | self._usage_so_far()
            yield self._piece(*first) | self._usage_so_far()
            async for index, piece in pieces:
                yield self._piece(index, piece) | self._usage_so_far()
        if self._tells_usage:
            yield self._object("chat.completion.chunk", []) | {"usage": self._usage()}

    def _piece(self, index: int, piece: Piece) -> dict[str, Any]:
        turn = self.turns[index]
        said = turn.after_text(piece.text, ends=piece.finish_reason is not None)
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return self._chunk(index, said.delta(), logprobs=logprobs, reason=_reason(piece, turn))

    def _chunk(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._object("chat.completion.chunk", [choice])

    def _usage(self) -> dict[str, Any]:
        cached = min(each.cached_tokens for each in self.usages)
        total = Usage.of_all(self.usages, prompt_tokens=self.usages[0].prompt_tokens, cached_tokens=cached)
        return total.described()

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        content = [
            self._logprob(token.id, token.logprob)
            | {"top_logprobs": [self._logprob(*each) for each in token.top_logprobs]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._served.text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _message(said: Said) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.content or None, "refusal": None}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.calls:
        message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in said.calls]
    else:
        message["content"] = said.content
    return message


def _reason(piece: Piece, turn: Turn | ForcedCalls) -> str | None:
    """Why an answer ends: with calls of tools, or as the piece says."""
    return "tool_calls" if piece.finish_reason == "stop" and turn.has_calls else piece.finish_reason
