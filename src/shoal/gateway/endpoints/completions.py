"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from shoal.client.generation.generation import Token
from shoal.gateway.bodies import CompletionRequest
from shoal.gateway.endpoints.openai_answer import OpenAIAnswer
from shoal.gateway.endpoints.prompt_passes import prompt_tokens
from shoal.gateway.error_objects import bad_field
from shoal.gateway.replies import Asker, GenerationInputs, Piece, Usage, together, whole_answers
from shoal.gateway.served_model import ServedModel
from shoal.gateway.token_options import stream_options

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this endpoint."""


class CompletionAnswer(OpenAIAnswer):
    """The answers to one request: `whole` at once, or `chunks` as they come."""

    def __init__(self, served: ServedModel, request: CompletionRequest, *, asker: Asker) -> None:
        if request.echo and request.stream:
            raise bad_field("echo", "echo is not supported with stream")
        if request.max_tokens == 0 and not request.echo:
            raise bad_field("max_tokens", "0 tokens and no echo leave nothing to answer")
        super().__init__("cmpl", request)
        self._served = served
        self._request = request
        self._asker = asker
        self._texts_before: list[str] = []
        self.inputs: list[GenerationInputs] = []
        self.usages: list[Usage] = []
        max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        for prompt in request.prompts:
            ids_1S = served.ids_of_prompt(prompt)
            num_prompt = ids_1S.shape[1]
            most = served.most_new_tokens(num_prompt, max_tokens, param="max_tokens")
            for index in range(request.n or 1):
                options = stream_options(request, served, num_prompt_tokens=num_prompt, index=index)
                options |= {"max_new_tokens": most, "num_logprobs": request.logprobs}
                self.inputs.append(GenerationInputs(served, ids_1S, asker, options, request.stop_texts))
                self.usages.append(Usage(num_prompt))
                self._texts_before.append(self._echoed(prompt) if request.echo else "")

    async def whole(self) -> dict[str, Any]:
        """OpenAI's `Completion`."""
        if self._request.max_tokens == 0:
            answers = [Piece("", (), "length") for _ in self.inputs]
        else:
            answers = await whole_answers(self.inputs, self.usages)
        choices = []
        known: tuple[Token, ...] = ()
        for index, (before, answer, inputs) in enumerate(zip(self._texts_before, answers, self.inputs, strict=True)):
            tokens, start, text = answer.tokens, len(before), before + answer.text
            if self._request.echo and self._request.logprobs is not None:
                if index % (self._request.n or 1) == 0:  # all answers to a prompt begin with it
                    async with self._asker.text():
                        known = await prompt_tokens(self._served, inputs.ids_1S, self._request.logprobs)
                tokens, start = (*known, *tokens), 0
            choices.append(self._choice(index, text, tokens, answer.finish_reason, start=start))
        return self._object("text_completion", choices) | {"usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The same in pieces."""
        starts = [0] * len(self.inputs)
        async with aclosing(together(self.inputs, self.usages)) as pieces:
            async for index, piece in pieces:
                choice = self._choice(index, piece.text, piece.tokens, piece.finish_reason, before=starts[index])
                starts[index] += len(piece.text)
                yield self._object("text_completion", [choice]) | self._usage_so_far()
        if self._tells_usage:
            yield self._object("text_completion", []) | {"usage": self._usage()}

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], reason: str | None, *, start: int = 0, before: int = 0
    ) -> dict[str, Any]:
        """A text, or a piece of one with `before` characters before it. Its tokens begin at its character `start`."""
        logprobs = None
        if self._request.logprobs is not None:
            pieces = [self._served.text_of(token.id) for token in tokens]
            offsets = [before + offset for offset in text_offsets(pieces, text, start=start)]
            logprobs = self._logprobs(tokens, pieces, offsets)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token], pieces: list[str], offsets: list[int]) -> dict[str, Any]:
        top = [
            None if token.logprob is None else {self._served.text_of(each): value for each, value in token.top_logprobs}
            for token in tokens
        ]
        return {
            "tokens": pieces,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _usage(self) -> dict[str, Any]:
        each_prompt = self.usages[:: self._request.n or 1]
        total = Usage.of_all(
            self.usages,
            prompt_tokens=sum(each.prompt_tokens for each in each_prompt),
            cached_tokens=sum(each.cached_tokens for each in each_prompt),
        )
        return total.described()

    def _echoed(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else str(self._served.tokenizer.decode(prompt))


def text_offsets(pieces: Sequence[str], text: str, *, start: int = 0) -> list[int]:
    """Where in a text each of these pieces begins. One that is not there, such as a mark of the end, has no width."""
    offsets, position = [], start
    for piece in pieces:
        offsets.append(position)
        if text.startswith(piece, position):
            position += len(piece)
    return offsets
