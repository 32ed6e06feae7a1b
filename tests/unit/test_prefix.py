from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.prefix import DIGEST_BYTES, PAGE_TOKENS, next_hash, page_hashes, root_hash
from shoal.server.kv.session_cache import Row
from shoal.spans import Span

FIRST = root_hash(Span(0, 4), "salt")
POSITIONS = torch.arange(100)


def inputs(num_tokens: int = 100) -> torch.Tensor:
    return torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(0))


def test_each_full_page_has_a_hash_and_the_last_partial_page_has_none():
    for num_tokens in range(3 * PAGE_TOKENS + 1):
        hashes = page_hashes(FIRST, inputs(num_tokens), POSITIONS[:num_tokens])
        assert len(hashes) == len(set(hashes)) == num_tokens // PAGE_TOKENS
        assert all(len(each) == DIGEST_BYTES for each in hashes)


def test_a_sequence_has_the_hashes_of_its_prefix():
    assert page_hashes(FIRST, inputs(), POSITIONS)[:3] == page_hashes(FIRST, inputs(50), POSITIONS[:50])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_equal_sequences_have_equal_hashes_in_any_division_into_steps(sizes):
    num_tokens = sum(sizes)
    hidden, positions = inputs(num_tokens), torch.arange(num_tokens)
    row = Row(FIRST)
    for piece, where in zip(hidden.split(sizes), positions.split(sizes), strict=True):
        row.append_inputs(piece, where)
    assert row.digests == page_hashes(FIRST, hidden, positions)


@given(st.integers(1, 99), st.integers(0, 99))
def test_a_cropped_sequence_has_the_hashes_of_its_new_content_or_none(cut, keep):
    hidden = inputs()
    row = Row(FIRST)
    row.append_inputs(hidden[:cut], POSITIONS[:cut])
    keep = min(keep, cut)
    row.crop(keep)
    other = hidden + 1
    row.append_inputs(other[keep:], POSITIONS[keep:])
    becomes = page_hashes(FIRST, torch.cat((hidden[:keep], other[keep:])), POSITIONS)
    assert row.digests == becomes[: len(row.digests)]
    assert len(row.digests) >= keep // PAGE_TOKENS


def test_a_hash_depends_on_all_pages_before():
    other = inputs()
    other[3, 5] += 1
    pairs = zip(page_hashes(FIRST, inputs(), POSITIONS), page_hashes(FIRST, other, POSITIONS), strict=True)
    assert all(ours != theirs for ours, theirs in pairs)


@pytest.mark.parametrize("token", [0, 15, 16, 40, 95])
@pytest.mark.parametrize("what", ["an input", "a sign of zero", "a position"])
def test_hashes_differ_from_the_first_difference_on(token: int, what: str):
    hidden, positions = inputs(), POSITIONS.clone()
    hidden[token, 0] = 0.0
    before = page_hashes(FIRST, hidden, positions)
    if what == "a position":
        positions[token] += 1
    else:
        hidden[token, 0] = 1e-30 if what == "an input" else -0.0
    after = page_hashes(FIRST, hidden, positions)
    page = token // PAGE_TOKENS
    assert before[:page] == after[:page]
    assert all(ours != theirs for ours, theirs in zip(before[page:], after[page:], strict=True))


def test_hashes_depend_on_blocks_salt_and_dtype():
    roots = [
        root_hash(span, salt) for span in (Span(0, 4), Span(0, 3), Span(1, 4)) for salt in ("", "salt", "salt2", "\n")
    ]
    page = inputs(PAGE_TOKENS)
    hashes = [next_hash(first, page, POSITIONS[:PAGE_TOKENS]) for first in roots]
    hashes += [next_hash(FIRST, page.to(dtype), POSITIONS[:PAGE_TOKENS]) for dtype in (torch.bfloat16, torch.float16)]
    half = page.half()
    hashes += [next_hash(FIRST, half.view(torch.bfloat16), POSITIONS[:PAGE_TOKENS])]
    assert len({*roots, *hashes}) == len(roots) + len(hashes)
