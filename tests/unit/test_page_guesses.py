"""What servers inside a ring may have cached of a known text is guessed, and believed only if it follows again."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest
import torch

from shoal.client.decoding.opening.page_guesses import ASIDE_BYTES, PageGuesses
from shoal.client.decoding.pipeline import close_all
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Stage
from shoal.client.history.history import History
from shoal.client.history.history_store import HistoryStore
from shoal.client.history.remembered_pages import MOST_REMEMBERED, RememberedPages
from shoal.model.peft.factors import ActiveAdapters
from shoal.policy.routing.route import Hop
from shoal.prefix import PAGE_TOKENS
from shoal.spans import Span

from .test_connection import SERVER

HIDDEN = 8
TEXT = 40
"""Tokens of a text: two pages and a half."""
SECOND = Span(2, 4)


def some_inputs(num_tokens: int, *, seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


class OfSession:
    """A session with a text, on a ring of two servers: what the second was given of it may be known."""

    def __init__(self, store: HistoryStore, text_BTD: torch.Tensor, *, salt: str = "ours", span: Span = SECOND):
        self.inputs = SessionInputs(store, salt=salt)
        self.inputs.append(text_BTD, None, None)
        self.guesses = PageGuesses(store.pages, self.inputs, ActiveAdapters())
        self.first = Stage(Hop(SERVER, Span(0, 2)), self.inputs.hidden, lambda: None)
        self.second = Stage(Hop(SERVER, span), History(store), lambda: None)

    def guess(self, most_tokens: int = TEXT) -> list[list[bytes]] | None:
        """What the second server is expected to be given."""
        return self.guesses.guess([self.first, self.second], lambda stage: most_tokens).get(self.second)

    def gives(self, inputs_BTD: torch.Tensor) -> None:
        """The first server has answered what the second one is given."""
        self.second.append(inputs_BTD, self.second.num_tokens)

    def ends(self) -> None:
        asyncio.run(self.guesses.remember([self.first, self.second]))


@pytest.fixture
def store() -> HistoryStore:
    """That of a client which has had one session."""
    store = HistoryStore()
    before = OfSession(store, some_inputs(TEXT, seed=0))
    before.gives(some_inputs(TEXT, seed=1))
    before.ends()
    return store


def test_what_followed_from_a_text_is_expected_again(store: HistoryStore):
    later = OfSession(store, torch.cat((some_inputs(TEXT, seed=0), some_inputs(9, seed=5)), dim=1))
    guess = later.guess()
    assert guess is not None
    assert [len(row) for row in guess] == [2, 2]
    assert later.guesses.is_right(later.second, guess, 0)
    assert not later.guesses.is_right(later.second, guess, 2 * PAGE_TOKENS)  # its inputs are not known yet
    later.gives(some_inputs(TEXT, seed=1)[:, : 2 * PAGE_TOKENS])
    assert later.guesses.is_right(later.second, guess, 2 * PAGE_TOKENS)
    assert later.guesses.is_right(later.second, guess, PAGE_TOKENS)


@pytest.mark.parametrize("row", [0, 1])
def test_a_guess_is_wrong_if_other_inputs_follow_in_any_row(store: HistoryStore, row: int):
    later = OfSession(store, some_inputs(TEXT, seed=0))
    guess = later.guess()
    assert guess is not None
    others = some_inputs(TEXT, seed=1)
    others[row, PAGE_TOKENS, 0] += 1e-6
    later.gives(others)
    assert later.guesses.is_right(later.second, guess, PAGE_TOKENS)
    assert not later.guesses.is_right(later.second, guess, 2 * PAGE_TOKENS)
    later.guesses.forget(later.second)
    assert OfSession(store, some_inputs(TEXT, seed=0)).guess() is None


def test_nothing_is_guessed_of_another_text_salt_span_or_of_less_than_a_page(store: HistoryStore):
    text = some_inputs(TEXT, seed=0)
    assert OfSession(store, text).guess(2 * PAGE_TOKENS - 1) == [
        row[:1] for row in OfSession(store, text).guess() or []
    ]
    assert OfSession(store, text).guess(PAGE_TOKENS - 1) is None
    assert OfSession(store, some_inputs(TEXT, seed=7)).guess() is None
    assert OfSession(store, text, salt="theirs").guess() is None
    assert OfSession(store, text, span=Span(2, 3)).guess() is None
    assert OfSession(store, torch.cat((text[:1], some_inputs(TEXT, seed=7)[:1]))).guess() is None


def test_what_is_remembered_is_limited():
    memory = RememberedPages()
    pages = [number.to_bytes(16) for number in range(MOST_REMEMBERED + 2)]
    memory.note(b"place", pages, pages)
    assert memory.names(b"place", pages[:1]) == []
    assert memory.names(b"place", pages[2:4]) == pages[2:4]


class SlowlyNamed(History):
    """Inputs that a thread has begun to name, and that are not read before they may be."""

    def __init__(self, store: HistoryStore) -> None:
        super().__init__(store)
        self.begun, self.may_be_read = threading.Event(), threading.Event()

    def between(self, start: int, end: int) -> torch.Tensor:
        self.begun.set()
        assert self.may_be_read.wait(60)
        return super().between(start, end)


class Closing:
    """As much of a pipeline as closing needs."""

    def __init__(self, session: OfSession) -> None:
        self.is_disconnected = False
        self._session = session

    async def disconnect(self) -> None:
        self.is_disconnected = True

    async def remember(self) -> None:
        await self._session.guesses.remember([self._session.first, self._session.second])


def test_a_caller_who_is_cancelled_while_pages_are_named_is_let_go() -> None:
    store = HistoryStore()
    num_tokens, rows = ASIDE_BYTES // (HIDDEN * 4 * 16) + 1, 16
    session = OfSession(store, some_inputs(num_tokens, seed=0, rows=rows))
    slow = SlowlyNamed(store)
    session.second = Stage(Hop(SERVER, SECOND), slow, lambda: None)
    session.gives(some_inputs(num_tokens, seed=1, rows=rows))
    pipeline = Closing(session)

    async def cancelled() -> None:
        closing = asyncio.create_task(close_all([cast(Any, pipeline)]))
        assert await asyncio.to_thread(slow.begun.wait, 60)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        slow.may_be_read.set()

    asyncio.run(cancelled())  # waits for the thread
    assert pipeline.is_disconnected
    assert OfSession(store, some_inputs(num_tokens, seed=0, rows=rows)).guess() is None
