"""The two ends of a model, which a client computes: the embeddings before the blocks, norm and head after them.

There is no code per family. The model itself is called, with a cache whose session computes nothing (`_Tap`): before
the blocks, it takes what the backbone would send; after them, it puts in what the servers have answered.

    embed          ids ─▶ [the backbone, to its first layer] ─▶ what a session sends
    logits         what a session got ─▶ [the backbone's norm, the head] ─▶ logits of the next token
    hidden_states  the same without the head

All generations go through one call. Families whose embeddings depend on what precedes a token in the cache, and not
on its position alone, are called once for each; a trial with four tokens finds that out.
"""

# R generations (rows), T new tokens, S all tokens, D hidden size, V vocabulary

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.client.call_inputs import on_cpu, positions_of
from shoal.client.head.logits import HeadCall, Logits, LogitsRequest
from shoal.model.remote_cache import RemoteCache, cache_argument
from shoal.protocol import MAX_STEP_TOKENS

TRIAL_IDS = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 1, 1, 0]])
"""Two texts of which the last tokens are embedded after others, in one after one more than in the other."""


@dataclass(frozen=True)
class Embedded:
    """What a session sends: hidden states [1, T, D], and position ids [1, T] if the family has any."""

    hidden_1TD: Tensor
    positions_1T: Tensor | None


class _Tap:
    """Stands for a session with `num_tokens` tokens: it keeps what would be sent, and returns what was `answered`."""

    def __init__(self, num_tokens: int, rows: int, answered_R1D: Tensor | None = None) -> None:
        self.num_tokens = num_tokens
        self.batch_size = rows
        self.max_length = torch.iinfo(torch.int64).max
        self.hidden_RTD: Tensor | None = None
        self.positions_RT: Tensor | None = None
        self._answered_R1D = answered_R1D

    def step(
        self,
        hidden_RTD: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_call: HeadCall | None = None,
    ) -> Tensor:
        self.hidden_RTD, self.positions_RT = hidden_RTD, positions_of(position_ids, hidden_RTD)
        return hidden_RTD if self._answered_R1D is None else self._answered_R1D

    def crop(self, num_tokens: int) -> None: ...
    def select_rows(self, rows: Sequence[int]) -> None: ...
    def expect(self, num_tokens: int) -> None: ...
    def record_token_ids(self, ids_BT: Tensor | None, mask_BS: Tensor | None) -> None: ...


class ModelEnds:
    """Embeddings and logits of one model, for many generations at once. One thread at a time may use it."""

    def __init__(self, model: Any) -> None:
        names = inspect.signature(model.forward).parameters
        self._cache_name = cache_argument(names)
        self._takes_positions = "position_ids" in names
        with torch.no_grad():
            self._together = self._can_embed_together(model)

    @torch.no_grad()
    def embed(self, model: Any, texts: Sequence[tuple[Tensor, int]]) -> list[Embedded]:
        """What each text sends for its new tokens: its ids [1, S], and how many of them were sent before."""
        alike: dict[int, list[int]] = {}  # those with equally many new tokens
        for index, (ids_1S, past) in enumerate(texts):
            if past:
                alike.setdefault(ids_1S.shape[1] - past, []).append(index)
        found: dict[int, Embedded] = {}
        for num_new, indices in alike.items():
            if self._together and len(indices) > 1:
                together = self._embed_together(model, [texts[index] for index in indices], num_new=num_new)
                found.update(zip(indices, together, strict=True))
        return [found.get(index) or self._embed_one(model, *text) for index, text in enumerate(texts)]

    @torch.no_grad()
    def logits(self, model: Any, answers: Sequence[tuple[Tensor | Logits, int]]) -> list[Tensor]:
        """Logits [N, V] in float32 of the tokens that follow the last N of each answer.

        An answer is hidden states [1, T, D], or a server's logits [1, N, V], with its N.
        """
        hidden = [(answer[0, -num_last:], num_last) for answer, num_last in answers if isinstance(answer, Tensor)]
        computed: list[Tensor] = []
        if hidden:
            all_RD = torch.cat([each_ND for each_ND, _ in hidden]).to(model.device)
            computed = list(self._head(model, all_RD[:, None]).split([num_last for _, num_last in hidden]))
        own = iter(computed)
        return [next(own) if isinstance(answer, Tensor) else self._finish_head(model, answer) for answer, _ in answers]

    @torch.no_grad()
    def hidden_states(self, model: Any, outputs_ND: Tensor) -> Tensor:
        """The last hidden states [N, D] of N tokens, after the final norm, from the outputs of the blocks."""
        found_N1D: Tensor = self._call(model, outputs_ND[:, None].to(model.device), part=model.base_model)[0]
        return found_N1D[:, -1]

    def logits_request(self, model: Any, hidden_1TD: Tensor, *, num_tokens: int) -> LogitsRequest | None:
        """What a session asks a server's head about the last inputs; `None` if the client computes the head."""
        remote = model._remote_head
        if remote is None:
            return None
        cache = RemoteCache(_Tap(1, 1))
        call = remote.head_call(model, {self._cache_name: cache, "logits_to_keep": num_tokens})
        request: LogitsRequest | None = None if call is None else call.logits_request(hidden_1TD)
        return request

    def most_logits(self, model: Any) -> int:
        """For how many tokens one answer can have logits; at least one."""
        remote = model._remote_head
        return MAX_STEP_TOKENS if remote is None else max(1, remote.most_tokens(model.dtype))

    # -- before the blocks ---------------------------------------------------------------------------------------------

    def _embed_one(self, model: Any, ids_1S: Tensor, past: int) -> Embedded:
        tap = _Tap(past, 1)
        model.base_model(**self._inputs(model, ids_1S, tap, num_new=ids_1S.shape[1] - past))
        return _sent(tap, 0)

    def _embed_together(self, model: Any, texts: Sequence[tuple[Tensor, int]], *, num_new: int) -> list[Embedded]:
        """The same for texts with as many new tokens each. They differ in these tokens, and where they stand."""
        tap = _Tap(max(past for _, past in texts), len(texts))
        first = self._inputs(model, texts[0][0], tap, num_new=num_new)
        inputs = {name: value for name, value in first.items() if not isinstance(value, Tensor)}
        inputs["input_ids"] = torch.cat([ids_1S[:, -num_new:] for ids_1S, _ in texts])
        if "position_ids" in first:
            lengths_R1 = torch.tensor([[ids_1S.shape[1]] for ids_1S, _ in texts], device=model.device)
            inputs["position_ids"] = first["position_ids"] + lengths_R1 - lengths_R1[:1]
        model.base_model(**inputs)
        return [_sent(tap, row) for row in range(len(texts))]

    def _inputs(self, model: Any, ids_1S: Tensor, tap: _Tap, *, num_new: int) -> dict[str, Any]:
        """What `generate()` calls the model with for the last tokens of a text, without what only its head takes."""
        mask_1S = torch.ones_like(ids_1S)
        positions = model._prepare_position_ids_for_generation(ids_1S, {"attention_mask": mask_1S})
        prepared: dict[str, Any] = model.prepare_inputs_for_generation(
            ids_1S,
            next_sequence_length=num_new,
            attention_mask=mask_1S,
            use_cache=True,
            **({"position_ids": positions} if self._takes_positions else {}),
            **{self._cache_name: RemoteCache(tap)},
        )
        return {name: value for name, value in prepared.items() if value is not None}

    def _can_embed_together(self, model: Any) -> bool:
        """Whether two texts of different lengths get from one call what each gets from its own."""
        ids = TRIAL_IDS.to(model.device)
        for num_new in (1, 2):
            texts = [(ids[:1, :4], 4 - num_new), (ids[1:], 5 - num_new)]
            alone = [self._embed_one(model, *text) for text in texts]
            try:
                together = self._embed_together(model, texts, num_new=num_new)
            except (RuntimeError, ValueError, TypeError, KeyError, IndexError):
                return False
            if not all(_equal(one, other) for one, other in zip(alone, together, strict=True)):
                return False
        return True

    # -- after the blocks ----------------------------------------------------------------------------------------------

    def _head(self, model: Any, hidden_R1D: Tensor) -> Tensor:
        """Norm and head over the last hidden states."""
        logits_RTV: Tensor = self._call(model, hidden_R1D).logits
        return logits_RTV[:, -1].to(copy=True, dtype=torch.float32)

    def _finish_head(self, model: Any, answer: Logits) -> Tensor:
        """What the model's code does to logits after the projection, such as a soft cap, to a server's. [N, V]"""
        call = HeadCall(1, cache=RemoteCache(_Tap(1, 1)), vocabulary=model._remote_head.vocabulary, top_k=None)
        call.answer = answer.by_token().to(model.device)
        hidden_N1D = torch.zeros(
            len(call.answer.values), 1, model.config.get_text_config().hidden_size, dtype=model.dtype
        )
        outputs = call.finished(self._call(model._remote_head.view_of(model, call), hidden_N1D.to(model.device)))
        logits_N1V: Tensor = outputs.logits
        return logits_N1V[:, -1].to(copy=True, dtype=torch.float32)

    def _call(self, model: Any, hidden_R1D: Tensor, *, part: Any = None) -> Any:
        """The whole model, or this part of it, with these hidden states for what its blocks return."""
        num_rows = len(hidden_R1D)
        tap = _Tap(1, num_rows, hidden_R1D)
        ids_12 = torch.zeros(1, 2, dtype=torch.long, device=hidden_R1D.device)
        inputs = self._inputs(model, ids_12, tap, num_new=1)
        for name in ("input_ids", "position_ids"):
            if name in inputs:
                inputs[name] = inputs[name].expand(num_rows, -1)
        inputs.pop("attention_mask", None)
        return nn.Module.__call__(model if part is None else part, **inputs, return_dict=True)


def _sent(tap: _Tap, row: int) -> Embedded:
    assert tap.hidden_RTD is not None
    positions_1T = None if tap.positions_RT is None else tap.positions_RT[row : row + 1]
    # The session keeps it for a replay: a part of the whole batch would keep all of it.
    return Embedded(on_cpu(tap.hidden_RTD[row : row + 1]).clone(), positions_1T)


def _equal(one: Embedded, other: Embedded) -> bool:
    if one.positions_1T is None or other.positions_1T is None:
        same = one.positions_1T is other.positions_1T
    else:
        same = torch.equal(one.positions_1T, other.positions_1T)
    return same and torch.equal(one.hidden_1TD, other.hidden_1TD)
