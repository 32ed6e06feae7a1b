"""All blocks of a model in this process, as a swarm would compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoal.model.body import Body
from shoal.model.body_cache import BodyCache
from shoal.model.remote_cache import UnopenedSession
from shoal.net.wire.encodings import as_received
from shoal.spans import Span
from shoal.tensors import Encoding


class LocalSession:
    """A session with one cache for each hop."""

    max_length = 1 << 20

    def __init__(self, caches: Sequence[BodyCache], batch_size: int) -> None:
        self.caches = caches
        self.batch_size = batch_size

    @property
    def num_tokens(self) -> int:
        return self.caches[0].num_tokens

    def crop(self, num_tokens: int) -> None:
        for cache in self.caches:
            cache.crop(num_tokens)

    def expect(self, num_tokens: int) -> None:
        pass

    def record_token_ids(self, ids_BT: Tensor | None, mask_BS: Tensor | None) -> None:
        pass

    def select_rows(self, rows: Sequence[int]) -> None:
        for cache in self.caches:
            cache.select_rows(rows)


class LocalBlocks(nn.Module):
    """Calls bodies one after another, each on its hop's span.

    Before, between and after them, hidden states and gradients are rounded as by sending them in `encoding`.
    """

    def __init__(self, hops: Sequence[tuple[Body, Span]], *, encoding: Encoding = "raw") -> None:
        super().__init__()
        self.hops = hops
        self.encoding = encoding

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: object | None,
    ) -> Tensor:
        caches: Sequence[BodyCache | None] = [None] * len(self.hops)
        session = getattr(past_key_values, "session", None)
        if isinstance(session, LocalSession):
            caches = session.caches
        elif session is not None and not isinstance(session, UnopenedSession):
            output_BTD: Tensor = session.step(hidden_BTD, attention_mask=attention_mask, position_ids=position_ids)
            return output_BTD
        hidden_BTD = Transfer.apply(hidden_BTD, self.encoding)
        for (body, span), cache in zip(self.hops, caches, strict=True):
            hidden_BTD = body(
                hidden_BTD, span=span, attention_mask=attention_mask, position_ids=position_ids, cache=cache
            )
            hidden_BTD = Transfer.apply(hidden_BTD, self.encoding)
        return hidden_BTD

    def active_session(self) -> None:
        return None

    def new_session(self, *, batch_size: int, max_length: int) -> LocalSession:
        return LocalSession([body.new_cache(span) for body, span in self.hops], batch_size)


class Transfer(torch.autograd.Function):
    """The rounding of hidden states, and of their gradient, by sending them."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, encoding: Encoding) -> Tensor:
        ctx.encoding = encoding
        return as_received(hidden_BTD.view_as(hidden_BTD), encoding)

    @staticmethod
    def backward(ctx: Any, *grads_BTD: Tensor) -> tuple[Tensor, None]:
        return as_received(grads_BTD[0], ctx.encoding), None


class NoBlocks(nn.Module):
    """Returns the hidden states unchanged. A model with no blocks must give other results."""

    def forward(self, hidden_BTD: Tensor, **_: object) -> Tensor:
        return hidden_BTD

    def active_session(self) -> None:
        return None
