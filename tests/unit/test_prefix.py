from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.prefix import DIGEST_BYTES, PAGE_TOKENS, following, page_names, root
from shoal.server.kv.session_cache import Row
from shoal.spans import Span

FIRST = root(Span(0, 4), "salt")
POSITIONS = torch.arange(100)


def inputs(num_tokens: int = 100) -> torch.Tensor:
    return torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(0))


def test_every_full_page_has_a_name_and_the_rest_has_none():
    for num_tokens in range(3 * PAGE_TOKENS + 1):
        names = page_names(FIRST, inputs(num_tokens), POSITIONS[:num_tokens])
        assert len(names) == len(set(names)) == num_tokens // PAGE_TOKENS
        assert all(len(name) == DIGEST_BYTES for name in names)


def test_a_longer_sequence_has_the_names_of_its_beginning():
    assert page_names(FIRST, inputs(), POSITIONS)[:3] == page_names(FIRST, inputs(50), POSITIONS[:50])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_equal_sequences_have_equal_names_in_whatever_pieces_they_come(sizes):
    num_tokens = sum(sizes)
    hidden, positions = inputs(num_tokens), torch.arange(num_tokens)
    row = Row(FIRST)
    for piece, where in zip(hidden.split(sizes), positions.split(sizes), strict=True):
        row.append_inputs(piece, where)
    assert row.digests == page_names(FIRST, hidden, positions)


@given(st.integers(1, 99), st.integers(0, 99))
def test_a_sequence_that_goes_back_has_the_names_of_what_it_becomes_or_none(cut, keep):
    hidden = inputs()
    row = Row(FIRST)
    row.append_inputs(hidden[:cut], POSITIONS[:cut])
    keep = min(keep, cut)
    row.crop(keep)
    other = hidden + 1
    row.append_inputs(other[keep:], POSITIONS[keep:])
    becomes = page_names(FIRST, torch.cat((hidden[:keep], other[keep:])), POSITIONS)
    assert row.digests == becomes[: len(row.digests)]
    assert len(row.digests) >= keep // PAGE_TOKENS


def test_names_depend_on_what_comes_before_a_page():
    other = inputs()
    other[3, 5] += 1
    pairs = zip(page_names(FIRST, inputs(), POSITIONS), page_names(FIRST, other, POSITIONS), strict=True)
    assert all(ours != theirs for ours, theirs in pairs)


@pytest.mark.parametrize("token", [0, 15, 16, 40, 95])
@pytest.mark.parametrize("what", ["an input", "a sign of zero", "a position"])
def test_whatever_differs_has_another_name_from_there_on(token: int, what: str):
    hidden, positions = inputs(), POSITIONS.clone()
    hidden[token, 0] = 0.0
    before = page_names(FIRST, hidden, positions)
    if what == "a position":
        positions[token] += 1
    else:
        hidden[token, 0] = 1e-30 if what == "an input" else -0.0
    after = page_names(FIRST, hidden, positions)
    page = token // PAGE_TOKENS
    assert before[:page] == after[:page]
    assert all(ours != theirs for ours, theirs in zip(before[page:], after[page:], strict=True))


def test_blocks_salts_and_precisions_have_names_of_their_own():
    roots = [root(span, salt) for span in (Span(0, 4), Span(0, 3), Span(1, 4)) for salt in ("", "salt", "salt2", "\n")]
    page = inputs(PAGE_TOKENS)
    names = [following(first, page, POSITIONS[:PAGE_TOKENS]) for first in roots]
    names += [following(FIRST, page.to(dtype), POSITIONS[:PAGE_TOKENS]) for dtype in (torch.bfloat16, torch.float16)]
    half = page.half()
    names += [following(FIRST, half.view(torch.bfloat16), POSITIONS[:PAGE_TOKENS])]
    assert len({*roots, *names}) == len(roots) + len(names)
