"""What a client sent a server or got from it, as digests, for as long as the server has not signed it."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from shoal.net.signing.token_digests import DIGEST_BYTES, token_digests
from shoal.net.wire.encodings import as_received
from shoal.tensors import Encoding

DIGEST_NOW_BYTES = 256 * 1024
"""Larger tensors than this are digested at once, so that they do not stay in memory."""
MOST_UNDIGESTED = 4
"""Older tensors than the last few are digested without having been asked for, so that they do not stay in memory."""


class LazyDigests:
    """The digests of the tokens from `start` on: computed when they are needed, which they may never be.

    The tensor travels, or has travelled and `is_decoded`, in this encoding.
    """

    def __init__(self, start: int, hidden_BTD: torch.Tensor, encoding: Encoding, *, is_decoded: bool) -> None:
        self._start = start
        self._hidden_BTD: torch.Tensor | None = hidden_BTD
        self._encoding: Encoding = encoding
        self._is_decoded = is_decoded
        self._digests = b""
        if hidden_BTD.nbytes > DIGEST_NOW_BYTES:
            self._digest(hidden_BTD)

    def _digest(self, hidden_BTD: torch.Tensor) -> None:
        decoded_BTD = hidden_BTD if self._is_decoded else as_received(hidden_BTD, self._encoding)
        self._digests, self._hidden_BTD = token_digests(decoded_BTD, self._encoding), None

    def between(self, start: int, end: int) -> bytes:
        """Those of the tokens between two positions."""
        if self._hidden_BTD is not None:
            self._digest(self._hidden_BTD)
        return self._digests[(start - self._start) * DIGEST_BYTES : (end - self._start) * DIGEST_BYTES]


@dataclass(frozen=True)
class Passage:
    """Tokens between two positions, sent or answered in one step of this `epoch`.

    `digests` is None if the answer had no hidden states of them. `pusher` is the server that has pushed them, or is to
    push them, to the one whose log this is in; None if the client sends them.
    """

    epoch: int
    start: int
    end: int
    digests: LazyDigests | None = None
    pusher: str | None = None


class TokenLog:
    """Passages in order, without two for one token."""

    def __init__(self) -> None:
        self._passages: list[Passage] = []

    def put(self, passage: Passage) -> None:
        """Add a passage, in place of all that was known from its start on."""
        self.crop(passage.start)
        self._passages.append(passage)
        if len(self._passages) > MOST_UNDIGESTED:
            older = self._passages[-1 - MOST_UNDIGESTED]
            if older.digests is not None:
                older.digests.between(older.start, older.end)

    def crop(self, num_tokens: int) -> None:
        """Forget the tokens from `num_tokens` on."""
        while self._passages and self._passages[-1].end > num_tokens:
            last = self._passages.pop()
            if last.start < num_tokens:
                self._passages.append(replace(last, end=num_tokens))

    def forget_before(self, position: int) -> None:
        """Forget the tokens before a position."""
        self._passages = [each for each in self._passages if each.end > position]

    def between(self, start: int, end: int) -> list[Passage] | None:
        """The passages between two positions, cut there; None if there is a gap."""
        found = [
            replace(each, start=max(each.start, start), end=min(each.end, end))
            for each in self._passages
            if each.start < end and each.end > start
        ]
        covered = start
        for each in found:
            if each.start != covered:
                return None
            covered = each.end
        return found if covered == end else None


def digests_of(passages: Sequence[Passage]) -> bytes | None:
    """The digests of all tokens of passages; None if some have none."""
    joined = bytearray()
    for each in passages:
        if each.digests is None:
            return None
        joined += each.digests.between(each.start, each.end)
    return bytes(joined)
