"""What a client asks a server's output head, and how the answer gets into the model's outputs.

Transformers' code runs unchanged around the blocks and after the projection. Only the projection is replaced during a
call, by one that returns the server's answer. So the soft caps and scalings that some families apply to logits are
applied by the client, to logits of either origin.
"""

# B sequences, T tokens of a step, N last of them, V vocabulary, K likeliest tokens

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.client.head.projection import projection_of
from shoal.errors import UserError
from shoal.model.remote_cache import RemoteCache
from shoal.protocol import MAX_LOGITS_BYTES, MAX_STEP_TOKENS

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LogitsRequest:
    """Asks for logits of the last `num_tokens` tokens of a step: of the whole vocabulary, or the `top_k` likeliest."""

    num_tokens: int
    vocabulary: int
    top_k: int | None

    @property
    def width(self) -> int:
        """How many logits the answer has for each token."""
        return self.vocabulary if self.top_k is None else self.top_k

    def num_bytes(self, hidden_BTD: torch.Tensor, num_tokens: int) -> int:
        """The size of the answer for `num_tokens` tokens of each sequence of a batch."""
        each = hidden_BTD.itemsize + (0 if self.top_k is None else torch.int64.itemsize)
        return hidden_BTD.shape[0] * num_tokens * self.width * each

    def fits(self, hidden_BTD: torch.Tensor) -> bool:
        """Whether the answer for a batch fits into one message, which has at most `MAX_STEP_TOKENS` tokens."""
        at_once = max(1, MAX_STEP_TOKENS // hidden_BTD.shape[0])
        return self.num_bytes(hidden_BTD, min(self.num_tokens, at_once)) <= MAX_LOGITS_BYTES

    def are_tokens(self, ids: torch.Tensor) -> bool:
        """Whether these are ids of tokens in the vocabulary, int64, all different within a position."""
        if ids.dtype != torch.int64 or ids.min() < 0 or ids.max() >= self.vocabulary:
            return False
        return bool((ids.sort(dim=-1).values.diff(dim=-1) != 0).all())


@dataclass(frozen=True)
class Logits:
    """A server's answer: logits [B, N, V], or [B, N, K] for the tokens `ids`, also [B, N, K]."""

    values: torch.Tensor
    ids: torch.Tensor | None

    @classmethod
    def joined(cls, pieces: Sequence[Logits]) -> Logits:
        """The answers for consecutive tokens as one."""
        if len(pieces) == 1:
            return pieces[0]
        ids = [piece.ids for piece in pieces if piece.ids is not None]
        return cls(torch.cat([piece.values for piece in pieces], dim=1), torch.cat(ids, dim=1) if ids else None)

    def split(self, num_tokens: int) -> tuple[Logits, Logits | None]:
        """Those of the first `num_tokens` tokens, and those of the others, if there are any."""
        if num_tokens == self.values.shape[1]:
            return self, None
        (values, later), ids = self.values.tensor_split([num_tokens], dim=1), self.ids
        of_ids = (None, None) if ids is None else ids.tensor_split([num_tokens], dim=1)
        return Logits(values, of_ids[0]), Logits(later, of_ids[1])

    def to(self, device: torch.device) -> Logits:
        """The same on another device."""
        return Logits(self.values.to(device), None if self.ids is None else self.ids.to(device))

    def by_token(self) -> Logits:
        """Those of the N tokens of one sequence, as if they were of one token of N sequences."""
        return Logits(self.values.transpose(0, 1), None if self.ids is None else self.ids.transpose(0, 1))

    def of_all(self, vocabulary: int) -> torch.Tensor:
        """Logits [B, N, V], in which the tokens that were not sent have, for now, the smallest logit that was."""
        if self.ids is None:
            return self.values
        all_BNV = self.values.amin(dim=-1, keepdim=True).repeat(1, 1, vocabulary)
        return all_BNV.scatter_(-1, self.ids, self.values)

    def without_others(self, logits_BNV: torch.Tensor) -> torch.Tensor:
        """The same logits, with -inf for the tokens that were not sent."""
        if self.ids is None:
            return logits_BNV
        others = torch.ones_like(logits_BNV, dtype=torch.bool).scatter_(-1, self.ids, value=False)
        return logits_BNV.masked_fill(others, float("-inf"))


class HeadCall:
    """One call of the model that asks a server for logits of its last `num_tokens` tokens, 0 for all; then the answer.

    While its context is entered, the cache passes it to the blocks.
    """

    def __init__(self, num_tokens: int, *, cache: RemoteCache, vocabulary: int, top_k: int | None) -> None:
        self.vocabulary = vocabulary
        self.answer: Logits | None = None
        self._num_tokens = num_tokens
        self._cache = cache
        self._top_k = top_k

    def __enter__(self) -> Self:
        self._cache.head_call = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._cache.head_call = None

    def logits_request(self, hidden_BTD: torch.Tensor) -> LogitsRequest | None:
        """What to ask about these inputs, or `None` if the answer would not fit into a message."""
        num_tokens = min(self._num_tokens or hidden_BTD.shape[1], hidden_BTD.shape[1])
        logits_request = LogitsRequest(num_tokens, self.vocabulary, self._top_k)
        return logits_request if logits_request.fits(hidden_BTD) else None

    def finished(self, outputs: Any) -> Any:
        """The model's outputs, with -inf for the tokens whose logits were not asked for."""
        if self.answer is None or self.answer.ids is None:
            return outputs
        if isinstance(outputs, tuple):
            return (self.answer.without_others(outputs[0]), *outputs[1:])
        outputs.logits = self.answer.without_others(outputs.logits)
        return outputs


class AnsweredProjection(nn.Module):
    """The output projection during one call: it returns the server's answer, or without one computes the logits."""

    def __init__(self, projection: nn.Module, head_call: HeadCall) -> None:
        super().__init__()
        self.__dict__["_projection"] = projection  # not a submodule: its parameters stay where they are
        self._head_call = head_call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_projection"], name)

    def forward(self, hidden_BND: torch.Tensor) -> torch.Tensor:
        answer = self._head_call.answer
        if answer is None:
            projected: torch.Tensor = self._projection(hidden_BND)
            return projected
        if hidden_BND.shape[:2] != answer.values.shape[:2]:
            raise UserError(
                f"the model needs logits of shape {list(hidden_BND.shape[:2])}, and the server was asked for "
                f"{list(answer.values.shape[:2])}",
                hint="this model needs remote_head=False",
            )
        return answer.of_all(self._head_call.vocabulary)


class RemoteHead:
    """How a model is called so that a server computes its output projection. Raises `UserError` if it has none."""

    def __init__(self, model: PreTrainedModel, *, top_k: int | None) -> None:
        if (found := projection_of(model)) is None:
            raise UserError(f"{type(model).__name__} has no output head that a server could compute")
        self._name, projection = found
        self._projection = [projection]  # in a list, so that it is not registered as a submodule
        self._version = projection.weight._version
        self.vocabulary = projection.out_features
        self._top_k = None if top_k is None else min(top_k, projection.out_features)

    def head_call(self, model: PreTrainedModel, arguments: Mapping[str, Any]) -> HeadCall | None:
        """What a call with these arguments asks a server, or `None` if the client has to compute the head.

        The client computes it without a session, for a loss, for a choice of single tokens, and once the head was
        changed.
        """
        cache = arguments.get("past_key_values", arguments.get("cache_params"))
        num_tokens = arguments.get("logits_to_keep", 0)
        (projection,) = self._projection
        changed = model.get_output_embeddings() is not projection or projection.weight._version != self._version
        if not isinstance(cache, RemoteCache) or not isinstance(num_tokens, int) or changed:
            return None
        if arguments.get("labels") is not None:
            return None
        return HeadCall(num_tokens, cache=cache, vocabulary=self.vocabulary, top_k=self._top_k)

    def most_tokens(self, dtype: torch.dtype) -> int:
        """For how many tokens of one sequence, computed in `dtype`, the logits fit into one answer."""
        request = LogitsRequest(1, self.vocabulary, self._top_k)
        return MAX_LOGITS_BYTES // request.num_bytes(torch.empty(1, 1, 0, dtype=dtype), 1)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises `UserError` for options of `generate()` that need the logits of all tokens, if not all are sent."""
        config = options.get("generation_config")
        scale = options.get("guidance_scale", getattr(config, "guidance_scale", None))
        if self._top_k is not None and scale not in (None, 1):
            raise UserError(
                "guidance compares the logits of all tokens, and head_top_k leaves most of them out",
                hint="open the model without head_top_k",
            )

    def view_of(self, model: M, head_call: HeadCall) -> M:
        """A shallow copy of the model with another projection, for one call."""
        view = copy.copy(model)
        projection = AnsweredProjection(self._projection[0], head_call)
        view.__dict__["_modules"] = {**model._modules, self._name: projection}
        return view
