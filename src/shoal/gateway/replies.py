"""One answer as it is generated: its text up to a stop text, its tokens, and why it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from shoal.client.generation.generation import Token
from shoal.gateway.served_model import Decoder, ServedModel


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer: text, the tokens that it ends, and at last why the answer ends."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    stop_text: str | None = None
    """The stop text that ends it, if one does."""


class Asker(Protocol):
    """The request that an answer is for."""

    @property
    def salt(self) -> str:
        """Prefixes are shared between requests of one salt."""
        ...

    def text(self) -> AbstractAsyncContextManager[None]:
        """Entered while one of the request's texts is computed: it waits for room."""
        ...


@dataclass(frozen=True)
class GenerationInputs:
    """An answer that was asked for: the prompt [1, S], who asks, and options of `model.stream`."""

    served: ServedModel
    ids_1S: torch.Tensor
    asker: Asker
    options: dict[str, Any]
    stop_texts: tuple[str, ...] = ()
    with_special: bool = False
    """Whether the text has its special tokens."""


@dataclass
class Usage:
    """Tokens that were read and generated."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Those of the prompt that all servers had in their caches."""

    doubtful_tokens: int = 0
    """Those of the answer that a server may have spoilt, which was found lying while it grew."""
    guessed_tokens: int = 0
    right_tokens: int = 0
    """Those that were guessed ahead, and those of them that the answer has."""

    @classmethod
    def of_all(cls, usages: Sequence[Usage], *, prompt_tokens: int, cached_tokens: int) -> Usage:
        """That of several answers to prompts of that many tokens."""
        return cls(
            prompt_tokens,
            sum(each.completion_tokens for each in usages),
            cached_tokens,
            sum(each.doubtful_tokens for each in usages),
            sum(each.guessed_tokens for each in usages),
            sum(each.right_tokens for each in usages),
        )

    def described(self) -> dict[str, Any]:
        """As OpenAI's object, with what there is to say of the answer's tokens."""
        found: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        details = {}
        if self.doubtful_tokens:
            details["doubtful_tokens"] = self.doubtful_tokens
        if self.guessed_tokens:
            details["accepted_prediction_tokens"] = self.right_tokens
            details["rejected_prediction_tokens"] = self.guessed_tokens - self.right_tokens
        return {**found, "completion_tokens_details": details} if details else found


@dataclass
class StopFinder:
    """Holds back text that may become a stop text, and ends an answer before it."""

    stop_texts: Sequence[str]
    _held: str = ""
    _waiting: list[tuple[int, Token]] = field(default_factory=list)
    _num_seen: int = 0
    _num_out: int = 0

    def after(self, text: str, token: Token) -> Piece:
        """What one more token, which adds `text`, makes certain."""
        self._waiting.append((self._num_seen, token))
        self._num_seen += len(text)
        self._held += text
        found = [(at, stop) for stop in self.stop_texts if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda each: each[0])
            return replace(self._out(at, "stop", all_of_them=False), stop_text=stop)
        if token.finish_reason is not None:
            return self._out(len(self._held), token.finish_reason, all_of_them=True)
        return self._out(len(self._held) - self._num_uncertain(), None, all_of_them=False)

    def _num_uncertain(self) -> int:
        """How many characters at the end may be the start of a stop text."""
        longest = max((len(stop) for stop in self.stop_texts), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stop_texts):
                return length
        return 0

    def _out(self, length: int, reason: str | None, *, all_of_them: bool) -> Piece:
        text, self._held = self._held[:length], self._held[length:]
        self._num_out += length
        certain = [token for at, token in self._waiting if all_of_them or at < self._num_out]
        self._waiting = self._waiting[len(certain) :]
        return Piece(text, tuple(certain), reason)


async def pieces(inputs: GenerationInputs, usage: Usage) -> AsyncGenerator[Piece, None]:
    """Generate an answer, when there is room. Close the iterator to stop. Counts the tokens in `usage` as they come."""
    async with inputs.asker.text(), aclosing(_generated(inputs, usage)) as found:
        async for piece in found:
            yield piece


async def _generated(inputs: GenerationInputs, usage: Usage) -> AsyncGenerator[Piece, None]:
    decoder, stops = Decoder(inputs.served.tokenizer, with_special=inputs.with_special), StopFinder(inputs.stop_texts)
    mask_1S = torch.ones_like(inputs.ids_1S)  # without one, generate() would take some special tokens for padding
    stream = await asyncio.to_thread(
        inputs.served.model.stream, inputs.ids_1S, attention_mask=mask_1S, salt=inputs.asker.salt, **inputs.options
    )
    async with stream:
        async for token in stream:
            usage.completion_tokens += 1
            usage.cached_tokens = stream.num_cached
            usage.doubtful_tokens = min(usage.completion_tokens, sum(each.end - each.start for each in stream.doubtful))
            usage.guessed_tokens, usage.right_tokens = stream.num_guessed, stream.num_right
            ends = token.finish_reason == "stop"  # with a token that is not text
            piece = stops.after("" if ends else decoder.text_after(token.id), token)
            if piece.text or piece.tokens or piece.finish_reason:
                yield piece
            if piece.finish_reason is not None:
                return


async def together(
    all_inputs: Sequence[GenerationInputs], usages: Sequence[Usage]
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several answers as they come, each with the answer's index. If one fails, all end."""
    came: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def run(index: int) -> None:
        try:
            async with aclosing(pieces(all_inputs[index], usages[index])) as found:
                async for piece in found:
                    came.put_nowait((index, piece))
            came.put_nowait((index, None))
        except Exception as error:
            came.put_nowait((index, error))

    running = [asyncio.create_task(run(index)) for index in range(len(all_inputs))]
    try:
        left = len(running)
        while left:
            index, item = await came.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def whole_answers(all_inputs: Sequence[GenerationInputs], usages: Sequence[Usage]) -> list[Piece]:
    """Several whole answers. If one fails, all end."""
    found: list[list[Piece]] = [[] for _ in all_inputs]
    async with aclosing(together(all_inputs, usages)) as coming:
        async for index, piece in coming:
            found[index].append(piece)
    return [
        Piece(
            "".join(piece.text for piece in each),
            tuple(token for piece in each for token in piece.tokens),
            each[-1].finish_reason,
            each[-1].stop_text,
        )
        for each in found
    ]
