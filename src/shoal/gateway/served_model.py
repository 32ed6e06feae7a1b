"""A model that the gateway serves, with its tokenizer: prompts become tokens, and tokens become text."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from llguidance import LLTokenizer
from tokenizers.decoders import DecodeStream

from shoal.client.generation.model_ends import ModelEnds
from shoal.errors import UserError
from shoal.gateway.bodies import Message
from shoal.gateway.error_objects import Refused, bad_field
from shoal.gateway.page.news import News
from shoal.gateway.structure import grammar_tokenizer

DEFAULT_NEW_TOKENS = 4096
"""How long an answer may get if the request does not say. Servers are chosen that have room for it."""


@dataclass(frozen=True)
class ServedModel:
    """A model by the name that requests give it. `model` is an open distributed model.

    `serve_arguments` are those with which `shoal serve` serves the same model. By default, that is its name. A model
    with an adapter has the name of its `base` without it.
    """

    name: str
    model: Any
    tokenizer: Any
    news: News = field(default_factory=News)
    serve_arguments: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    base: str | None = None
    turns: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False, compare=False)
    """Held while one piece of a prompt's pass is computed here: embeddings, norm or head."""

    def __post_init__(self) -> None:
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                f"the tokenizer of {self.name} cannot turn tokens into text one after another",
                hint="the model needs a tokenizer.json",
            )

    @property
    def context(self) -> int:
        """The most tokens that a text may have."""
        return int(self.model.blocks.max_length)

    @cached_property
    def end_tokens(self) -> list[int]:
        """The tokens that end a text."""
        found = self.model.generation_config.eos_token_id
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    @cached_property
    def ends(self) -> ModelEnds:
        """The embeddings, norm and head of the model. It may only be used in a turn."""
        return ModelEnds(self.model)

    @cached_property
    def for_grammars(self) -> LLTokenizer:
        """The tokenizer as grammars need it."""
        return grammar_tokenizer(self.tokenizer, self.end_tokens)

    async def missing_blocks(self) -> list[int]:
        """The blocks that no server computes at present, as far as this client knows."""
        blocks = self.model.blocks
        view = await blocks.runtime.awaited(blocks.swarm.servers.present())
        return list(view.missing(blocks.span))

    def ids_of_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """The tokens of a conversation, up to the start of the next answer, [1, S]. `options` go to the template.

        Without a chat template they are those of the texts one after another, as in `shoal chat`.
        """
        if self.tokenizer.chat_template is None:
            if tools:
                raise bad_field("tools", f"the model {self.name} has no chat template, and cannot call tools")
            return self.ids_of_text(" ".join(message.text.strip() for message in messages))
        described = [self._described(message) for message in messages]
        reserved = inspect.signature(self.tokenizer.apply_chat_template).parameters.keys()
        if own := sorted(reserved & (options or {}).keys()):
            raise bad_field("chat_template_kwargs", f"{', '.join(own)} cannot be set here")
        try:
            ids = self.tokenizer.apply_chat_template(
                described,
                tools=list(tools) or None,
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                **(options or {}),
            )["input_ids"]
        except Exception as error:  # a template is a program, which raises what it likes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise bad_field("messages", f"the model's chat template does not take these messages: {reason}") from None
        found: torch.Tensor = ids
        return self._checked(found)

    def ids_of_text(self, text: str) -> torch.Tensor:
        """The tokens of a text, [1, S]."""
        return self._checked(self.tokenizer(text, return_tensors="pt")["input_ids"].long())

    def ids_of_prediction(self, text: str) -> list[int]:
        """The tokens of a text that an answer may repeat, as far as the context reaches."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found[: self.context]

    def ids_of_prompt(self, prompt: str | list[int]) -> torch.Tensor:
        """The tokens of a prompt that is a text or tokens already, [1, S]."""
        if isinstance(prompt, str):
            return self.ids_of_text(prompt)
        self.check_known(prompt, param="prompt")
        return self._checked(torch.tensor([prompt], dtype=torch.long))

    def check_known(self, tokens: Iterable[int], *, param: str) -> None:
        """Raises `Refused` for tokens that the model does not have, which the field `param` names."""
        num_known = len(self.model.get_input_embeddings().weight)  # an adapter's embedding has no `num_embeddings`
        if max(tokens, default=0) >= num_known:
            raise bad_field(param, f"the model {self.name} has tokens 0 to {num_known - 1}")

    def most_new_tokens(self, num_prompt: int, wanted: int | None, *, param: str) -> int:
        """How many tokens an answer may have. Raises `Refused` if the model cannot have as many as are wanted."""
        left = self.context - num_prompt
        if left < 1 or (wanted is not None and wanted > left):
            raise Refused(
                400,
                f"this model's maximum context length is {self.context} tokens. However, the prompt has {num_prompt} "
                f"tokens and {wanted if wanted is not None else 'at least 1'} are wanted",
                param=param,
                code="context_length_exceeded",
            )
        return min(left, DEFAULT_NEW_TOKENS) if wanted is None else wanted

    def text_of(self, token: int) -> str:
        """The text of one token, by itself."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def _checked(self, ids_1S: torch.Tensor) -> torch.Tensor:
        if not ids_1S.shape[1]:
            raise Refused(400, "the prompt is empty, and this model's tokenizer adds no tokens of its own")
        return ids_1S

    @staticmethod
    def _described(message: Message) -> dict[str, Any]:
        """A message as chat templates take it."""
        role = "system" if message.role == "developer" else message.role
        found: dict[str, Any] = {"role": role, "content": message.text}
        if message.tool_calls:
            found["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                found[name] = value
        return found


class Decoder:
    """Turns tokens into text as they come. A character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: Any, *, with_special: bool = False) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=not with_special)

    def text_after(self, token: int) -> str:
        """The text that one more token adds."""
        added: str | None = self._stream.step(self._backend, token)
        return added or ""
