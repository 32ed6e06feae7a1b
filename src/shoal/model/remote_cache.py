"""Transformers' cache, backed by a session: the keys and values are on the servers.

`generate()`, and loops that users write, get a `RemoteCache` where Transformers would make a `DynamicCache`.
"""

# B rows, T new tokens, S tokens so far with the new ones

from __future__ import annotations

import sys
from collections.abc import Container, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from shoal.errors import UserError

CACHE_NAMES = ("past_key_values", "cache_params")
"""The arguments in which families take their cache; the second one is that of purely recurrent families."""
USE_CACHE_UNSET = "unset"
"""Stands for a `use_cache` that the caller did not give. Some families replace None by the config's value before the
backbone sees it, and then a choice cannot be told from a default. It counts as true."""


class Session(Protocol):
    """The client's session, as far as a cache needs it."""

    @property
    def num_tokens(self) -> int:
        """The number of tokens in the cache, without a soft prompt."""

    @property
    def batch_size(self) -> int:
        """The number of sequences."""

    @property
    def max_length(self) -> int:
        """The largest possible number of tokens."""

    def crop(self, num_tokens: int) -> None:
        """Go back to the first `num_tokens` tokens."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order. A row may be repeated, dropped or moved."""

    def expect(self, num_tokens: int) -> None:
        """Prepare for a session of `num_tokens` tokens in all."""

    def record_token_ids(self, ids_BT: Tensor | None, mask_BS: Tensor | None) -> None:
        """Remember the tokens of the last call, so that `generate()` can continue without being given them."""


class UnopenedSession:
    """Stands for a session that may never be needed: that of a call which does not say whether it wants a cache.

    The blocks compute such a call without a session. They replace this one by a session that opens at its first use.
    """

    num_tokens = 0
    batch_size = 1
    max_length = sys.maxsize

    def crop(self, num_tokens: int) -> None: ...
    def select_rows(self, rows: Sequence[int]) -> None: ...
    def expect(self, num_tokens: int) -> None: ...
    def record_token_ids(self, ids_BT: Tensor | None, mask_BS: Tensor | None) -> None: ...


class RemoteCache(Cache):  # type: ignore[misc]
    """A Transformers cache that stores nothing: a session counts its tokens, crops and reorders it.

    If it `ends_texts`, `generate()` ends a text that has filled the session. Otherwise a longer one is an error.
    """

    def __init__(self, session: Session, *, ends_texts: bool = False) -> None:
        super().__init__(layers=[])
        self.session = session
        self.ends_texts = ends_texts
        self.head_call: Any = None  # what the current call wants from the blocks in addition to hidden states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.session.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.session.num_tokens + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.session.num_tokens > 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("Transformers crops by a negative number of tokens")
        if tokens_to_remove < 0:
            self.session.crop(self.session.num_tokens + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.session.num_tokens > 0:
            self._select([row for row in range(self.session.batch_size) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        if self.session.num_tokens > 0:
            self.session.select_rows(rows)

    def activate_past_recording(self) -> None:
        """Do nothing: a session can always be rebuilt from its inputs."""

    @property
    def is_initialized(self) -> bool:
        return self.session.num_tokens > 0

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        return [False]


def cache_argument(parameters: Container[str]) -> str:
    """The argument in which a `forward` with these parameters takes its cache."""
    return "cache_params" if "cache_params" in parameters else "past_key_values"


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_for_call(blocks: Any, arguments: Mapping[str, Any], *, by_default: bool) -> RemoteCache | None:
    """The cache for a call that was given none; None if the call is computed without one.

    With `use_cache=False` there is no cache. Otherwise a call continues the active session. If there is no active
    session, `use_cache=True` opens one. A call that leaves `use_cache` out gets a cache if `by_default`, as in
    Transformers, but is computed as a single pass with gradients: its session opens only if the cache is used.
    """
    use_cache = arguments.get("use_cache")
    is_given = use_cache is not None and use_cache is not USE_CACHE_UNSET
    if is_given and not use_cache:
        return None
    if (session := blocks.active_session()) is not None:
        return RemoteCache(session)
    if is_given:
        return RemoteCache(blocks.new_session(batch_size=1, max_length=1))
    return RemoteCache(UnopenedSession()) if by_default else None


def full_mask(cache: RemoteCache, inputs: Mapping[str, Any]) -> Tensor:
    """The attention mask [B, S] of a call without padding, over the cached tokens and the new ones."""
    new = _new_tokens(inputs)
    return torch.ones(new.shape[0], cache.session.num_tokens + new.shape[1], dtype=torch.long, device=new.device)


def check_mask_length(mask_BS: Tensor, cache: RemoteCache, inputs: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the mask covers the cached tokens and the new ones."""
    num_new = _new_tokens(inputs).shape[1]
    if mask_BS.shape[1] != cache.session.num_tokens + num_new:
        raise UserError(
            f"a mask of {mask_BS.shape[1]} tokens for {num_new} tokens after the session's {cache.session.num_tokens}"
        )


def _new_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """The ids [B, T] or embeddings [B, T, D] of a call."""
    ids: Tensor | None = inputs.get("input_ids")
    return inputs["inputs_embeds"] if ids is None else ids
