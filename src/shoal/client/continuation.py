"""How a call of `generate()` continues the previous one in the same session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from shoal.client.inference_session import LARGER, InferenceSession
from shoal.errors import UserError
from shoal.model.remote_cache import RemoteCache

REPEATED_TOKENS = 8
"""New inputs that repeat this many of the session's first tokens, and then differ, are refused as a mistake."""


@dataclass(frozen=True)
class Continuation:
    """The tokens of a session and the new ones, [B, S]. The caller did not pass the first `num_hidden` of them."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    num_hidden: int

    @classmethod
    def of(cls, session: InferenceSession, new_ids: torch.Tensor | None, new_mask: torch.Tensor | None) -> Self:
        """What to generate from, given the session's past and what the caller passed.

        Raises `UserError` for tokens that repeat the session's beginning and then differ, because they would be read
        twice, and for a session whose tokens are not known, because it was given hidden states or embeddings.
        """
        past_ids, past_mask = session.output_ids, session.attention_mask
        num_told = 0 if past_ids is None else past_ids.shape[1]
        if session.num_tokens > num_told:
            raise UserError(
                f"the session has read {session.num_tokens} tokens, of which generate() knows {num_told}",
                hint="set session.position to where it shall continue, or session.output_ids to its tokens",
            )
        if past_ids is not None:
            past_mask = _mask_for(past_ids, past_mask)
        _go_back(session)
        if past_ids is None or past_mask is None:
            if new_ids is None:
                raise UserError("a session begins with some tokens: pass inputs")
            mask = torch.ones_like(new_ids) if new_mask is None else new_mask
            return cls(new_ids, mask, 0)
        if new_ids is None:
            return cls(past_ids, past_mask, past_ids.shape[1])
        if new_ids.shape[0] != past_ids.shape[0]:
            raise UserError(f"{new_ids.shape[0]} sequences in a session of {past_ids.shape[0]}")
        same = min(past_ids.shape[1], new_ids.shape[1])
        differs = (past_ids[:, :same] != new_ids[:, :same]).any(dim=0).nonzero()
        num_common = int(differs[0]) if len(differs) else same
        num_past = past_ids.shape[1]
        if num_common == num_past:
            grown = torch.ones_like(new_ids[:, num_past:])
            mask = torch.cat((past_mask, grown), dim=1) if new_mask is None else new_mask
            return cls(new_ids, mask, 0)
        if num_common >= max(REPEATED_TOKENS, num_past // 2):
            raise UserError(
                f"these tokens repeat the session's first {num_common} and then differ from it",
                hint="pass the new tokens only, or open another session",
            )
        mask = torch.ones_like(new_ids) if new_mask is None else new_mask
        return cls(torch.cat((past_ids, new_ids), dim=1), torch.cat((past_mask, mask), dim=1), num_past)

    def cache(self, session: InferenceSession, options: Mapping[str, Any]) -> RemoteCache:
        """The session as the cache of a call with these options of `generate()`.

        If they do not say how long the text gets, it ends where the session does. Raises `UserError` for a text that
        has no place in the session.
        """
        num_tokens = self.input_ids.shape[1]
        room, num_new = session.room_after(num_tokens), _new_tokens(options, num_tokens)
        if not room:
            raise UserError(f"{num_tokens} tokens in a session of at most {session.max_length}", hint=LARGER)
        if num_new is not None and num_new > room:
            raise UserError(
                f"{num_tokens} tokens and {num_new} new ones in a session of at most {session.max_length}",
                hint=f"max_new_tokens={room} has a place in it; or {LARGER}",
            )
        return RemoteCache(session, ends_texts=num_new is None)

    @staticmethod
    def abandon(session: InferenceSession) -> None:
        """The call failed or was interrupted: the session forgets the tokens that it did not return."""
        session.in_call = False
        _go_back(session)

    def finish(self, session: InferenceSession, result: Any) -> Any:
        """Record in the session what was generated, and return it without the tokens that the caller did not pass."""
        sequences: torch.Tensor = result if isinstance(result, torch.Tensor) else result.sequences
        grown = sequences.shape[1] - self.attention_mask.shape[1]
        repeats = sequences.shape[0] // self.attention_mask.shape[0]
        mask = self.attention_mask.repeat_interleave(repeats, dim=0)
        session.in_call = False
        session.output_ids = sequences
        session.attention_mask = torch.cat((mask, mask.new_ones((mask.shape[0], grown))), dim=1)
        # The last token is not computed yet. After a beam search, the cache belongs to other sequences.
        same_rows = session.batch_size == sequences.shape[0] == self.input_ids.shape[0]
        session.crop(min(session.num_tokens, sequences.shape[1] - 1) if same_rows else 0)
        if isinstance(result, torch.Tensor):
            return sequences[:, self.num_hidden :]
        result.sequences = sequences[:, self.num_hidden :]
        return result


def _go_back(session: InferenceSession) -> None:
    """Forget all but the tokens that the caller knows, or everything if the rows are others, such as beams.

    The last token of a text is not computed before the next one is wanted.
    """
    ids = session.output_ids
    num_known, rows = (0, 0) if ids is None else (ids.shape[1] - 1, ids.shape[0])
    session.crop(min(session.num_tokens, num_known) if session.batch_size == rows else 0)


def _new_tokens(options: Mapping[str, Any], num_tokens: int) -> int | None:
    """The most new tokens after `num_tokens` that the caller has asked for; `None` if they left it to the model."""
    config = options.get("generation_config")
    num_new, longest = (
        getattr(config, name, None) if options.get(name) is None else options[name]
        for name in ("max_new_tokens", "max_length")
    )
    if num_new is None and longest is not None:
        num_new = longest - num_tokens
    return num_new


def _mask_for(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mask [B, S] of a text that the caller may have made shorter or longer than its old mask."""
    fitted = torch.ones_like(ids)
    if mask is not None:
        num_tokens = min(ids.shape[1], mask.shape[1])
        fitted[:, :num_tokens] = mask[:, :num_tokens]
    return fitted
