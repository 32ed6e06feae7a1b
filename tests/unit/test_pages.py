"""Which sequences hold which pages of the cache, in any order of what sessions do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.policy.batching import snapshots
from shoal.prefix import PAGE_TOKENS, page_hashes, root_hash
from shoal.server.kv.pages import PagePool, pages_for
from shoal.server.kv.session_cache import SessionCache
from shoal.server.kv.states import SlotPool
from shoal.server.step_inputs import StepInputs
from shoal.spans import Span

NUM_PAGES = 12
SPAN = Span(0, 1)


def test_tokens_take_whole_pages():
    assert [pages_for(number) for number in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_pages_with_digests_are_allocated_last_and_the_least_recently_used_first():
    pool = PagePool(4)
    first, second, third, _ = pool.allocate(4)
    for page in (first, second, third):
        pool.register(page, bytes([page]))
    pool.release([third])
    pool.release([first])
    pool.release([second])
    pool.share(pool.find([bytes([first])]))
    pool.release([first])
    assert pool.allocate(3) == [third, second, first]
    assert pool.find([bytes([third])]) == []


def test_the_end_of_a_sequence_is_evicted_before_its_beginning():
    pool = PagePool(3)
    pages = pool.allocate(3)
    for page in pages:
        pool.register(page, bytes([page]))
    pool.release(pages)
    assert pool.allocate(2) == pages[:0:-1]
    assert pool.find([bytes([page]) for page in pages]) == pages[:1]


def test_digests_are_found_up_to_the_first_that_is_missing():
    pool = PagePool(3)
    for page, name in zip(pool.allocate(3), (b"a", b"b", b"d"), strict=True):
        pool.register(page, name)
    assert pool.find([b"a", b"b", b"c", b"d"]) == [0, 1]
    assert pool.find([b"c", b"a"]) == []


def test_of_two_equal_pages_the_first_is_shared():
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.find([b"same"]) == [first]
    pool.release([first, second])
    pool.check_integrity([])
    assert pool.num_available == 2


# A pool's own methods leave it whole, so a damage that `check_integrity` should find is done to its private attributes.


def held_twice(pool: PagePool) -> Iterable[int]:
    return [0, 0, 1]


def held_by_no_session(pool: PagePool) -> Iterable[int]:
    return [0]


def held_and_free(pool: PagePool) -> Iterable[int]:
    pool._free.append(0)
    return [0, 1]


def free_twice(pool: PagePool) -> Iterable[int]:
    pool._free.append(pool._free[0])
    return [0, 1]


def lost(pool: PagePool) -> Iterable[int]:
    pool._free.pop()
    return [0, 1]


def free_with_digest(pool: PagePool) -> Iterable[int]:
    pool._digest_of[3], pool._page_of[b"x"] = 3, 3  # type: ignore[assignment]
    return [0, 1]


def with_two_digests(pool: PagePool) -> Iterable[int]:
    pool._page_of[b"other"] = 0
    return [0, 1]


@pytest.mark.parametrize(
    "damage", [held_twice, held_by_no_session, held_and_free, free_twice, lost, free_with_digest, with_two_digests]
)
def test_damage_is_found(damage: Callable[[PagePool], Iterable[int]]):
    pool = PagePool(4)
    pool.allocate(2)
    pool.register(0, b"zero")
    pool.check_integrity([0, 1])
    with pytest.raises(AssertionError):
        pool.check_integrity(damage(pool))


def test_a_pool_whose_prefixes_are_reset_finds_no_page_and_loses_none():
    pool = PagePool(4)
    held, *others = pool.allocate(3)
    for page in (held, *others):
        pool.register(page, bytes([page]))
    pool.release(others)
    pool.reset_prefixes()
    assert pool.find([bytes([held])]) == []
    assert pool.num_available == 3
    assert not pool.is_shared(held)
    pool.check_integrity([held])
    pool.register(held, b"again")
    pool.release([held])
    assert pool.find([b"again"]) == [held]
    pool.check_integrity([])


class Sessions(RuleBasedStateMachine):
    """Sessions that open, grow, go back, branch and close in any order.

    `memory` models what was written where: the content of a page is its tokens and all tokens before them, and that of
    a slot is all tokens of its sequence.
    """

    num_pages = NUM_PAGES
    pages_of_slot = 0

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.num_pages)
        self.slots = SlotPool(self.pool, self.pages_of_slot)
        self.states: dict[int, tuple[int, ...]] = {}
        self.sessions: dict[SessionCache, list[tuple[int, ...]]] = {}  # each row's tokens so far
        self.memory: dict[int, tuple[int, ...]] = {}  # a page's tokens, with all that come before them
        self.num_opened = 0

    def _inputs(self, rows: list[tuple[int, ...]], start: int) -> StepInputs:
        hidden = torch.tensor([row[start:] for row in rows], dtype=torch.float32)[..., None]
        return StepInputs(hidden, None, None)

    @rule(num_rows=st.integers(1, 3), tokens=st.integers(0, 1), num_tokens=st.integers(1, 40))
    def open(self, num_rows: int, tokens: int, num_tokens: int) -> None:
        session = SessionCache(
            self.pool, SPAN, opened=self.num_opened, peer="peer", salt="", batch_size=num_rows, slots=self.slots
        )
        self.num_opened += 1
        hidden = torch.full((num_tokens, 1), float(tokens))
        names = page_hashes(root_hash(SPAN, ""), hidden, torch.arange(num_tokens))
        session.adopt([names] * num_rows, max_pages=3)
        adopted = (tokens,) * session.num_tokens
        self.sessions[session] = [adopted] * num_rows
        for row in session.rows:
            for index, page in enumerate(row.pages):
                assert self.memory[page] == adopted[: (index + 1) * PAGE_TOKENS], "the digest of other inputs"
            assert row.slot is None or self.states[row.slot] == adopted, "the states of other inputs"

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), token=st.integers(0, 1), num_tokens=st.integers(1, 20))
    def step(self, data: st.DataObject, token: int, num_tokens: int) -> None:
        session = data.draw(st.sampled_from(list(self.sessions)))
        rows = self.sessions[session]
        back = 0 if session.has_states else session.num_tokens // 2
        position = data.draw(st.sampled_from(sorted({0, back, session.num_tokens})))
        order = None
        if position and data.draw(st.booleans()):
            order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3))
            rows = [rows[index] for index in order]
        rows = [row[:position] + (token,) * num_tokens for row in rows]
        inputs = self._inputs(rows, position)
        session.begin_step(position, order, inputs)
        session.append_inputs(inputs)
        self.sessions[session] = [row[:position] for row in rows]
        while (num_left := position + num_tokens - session.num_tokens) and session.rows:
            some = data.draw(st.integers(1, session.tokens_in_one_chunk(num_left)))
            if session.pages_needed(some) > self.pool.num_available and data.draw(st.booleans()):
                session.drop_snapshots()
            if session.pages_needed(some) > self.pool.num_available:
                session.preempt()
                self.sessions.pop(session)
                return
            self._grow(session, rows, some)

    def _grow(self, session: SessionCache, rows: list[tuple[int, ...]], num_tokens: int) -> None:
        promised, available = session.pages_needed(num_tokens), self.pool.num_available
        growth = session.grow(num_tokens)
        assert available - self.pool.num_available <= promised
        for source, target in growth.copies:
            self.memory[target] = self.memory[source]
        for page in growth.new_pages:
            self.memory[page] = ()
        for source, target in growth.slot_copies:
            self.states[target] = self.states[source]
        for slot in growth.new_slots:
            self.states[slot] = ()
        for row, tokens in zip(session.rows, rows, strict=True):
            for slot in range(session.num_tokens, session.num_tokens + num_tokens):
                page = row.pages[slot // PAGE_TOKENS]
                assert not self.pool.is_shared(page), "a page is written that other sequences hold or can find"
                self.memory[page] = tokens[: slot + 1]
            if session.has_states:
                assert row.slot is not None
                assert not self.slots.is_shared(row.slot), "states are written that others hold or can find"
                assert self.states[row.slot] == tokens[: session.num_tokens]
                self.states[row.slot] = tokens[: session.num_tokens + num_tokens]
        session.record_computed(num_tokens)
        self.sessions[session] = [row[: session.num_tokens] for row in rows]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(list(self.sessions)))
        session.release()
        session.release()
        del self.sessions[session]

    @rule()
    def reset_prefixes(self) -> None:
        self.pool.reset_prefixes()
        held = {page for each in self.sessions for page in (*each.pages, *each.state_pages)}
        assert self.pool.num_available == self.num_pages - len(held)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.pool.check_integrity(page for session in self.sessions for page in (*session.pages, *session.state_pages))

    @invariant()
    def every_sequence_has_its_own_tokens(self) -> None:
        for session, rows in self.sessions.items():
            for row, tokens in zip(session.rows, rows, strict=True):
                for index in range(session.num_tokens // PAGE_TOKENS):
                    end = (index + 1) * PAGE_TOKENS
                    assert self.memory[row.pages[index]][:end] == tokens[:end]
                if rest := session.num_tokens % PAGE_TOKENS:
                    assert self.memory[row.pages[session.num_tokens // PAGE_TOKENS]][: len(tokens)] == tokens
                    assert rest

    def teardown(self) -> None:
        for session in self.sessions:
            session.release()
        self.pool.check_integrity([])
        assert self.pool.num_available == self.num_pages


class SessionsWithStates(Sessions):
    """The same with states, of which snapshots are kept at the end of every page."""

    num_pages = 24
    pages_of_slot = 3

    def __init__(self) -> None:
        super().__init__()
        self._interval = pytest.MonkeyPatch()
        self._interval.setattr(snapshots, "MIN_INTERVAL", PAGE_TOKENS)

    @invariant()
    def every_sequence_has_its_own_states(self) -> None:
        for session, rows in self.sessions.items():
            for row, tokens in zip(session.rows, rows, strict=True):
                assert row.slot is None or self.states[row.slot] == tokens

    def teardown(self) -> None:
        self._interval.undo()
        super().teardown()


SETTINGS = settings(max_examples=150, stateful_step_count=25, deadline=None, derandomize=True)
TestSessions = Sessions.TestCase
TestSessions.settings = SETTINGS
TestSessionsWithStates = SessionsWithStates.TestCase
TestSessionsWithStates.settings = SETTINGS
