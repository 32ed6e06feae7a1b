"""What is allowed between honest servers, who is blamed, what audits cost, and the evidence that is kept."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.swarm.audit_book import MAX_EVIDENCE_BYTES, AuditBook, Evidence
from shoal.client.swarm.comparing.distances import distances
from shoal.policy.audits.audit_budget import (
    FIRST_AUDIT_TOKENS,
    MOST_CREDIT_TOKENS,
    MOST_FAILED,
    MOST_SPEEDUP,
    USUAL_SPEEDUP,
    AuditBudget,
    Candidate,
    audit_cost,
    next_audit,
)
from shoal.policy.audits.likeness import (
    BOTH_INT8,
    BOTH_NF4,
    BY_ENCODING,
    EXACT,
    INT8_STATES,
    ONE_INT8,
    ONE_NF4,
    ROUNDED,
    Allowed,
    Form,
    allowed_among,
    allowed_between,
    are_alike,
    typical,
)
from shoal.policy.audits.verdict import Verdict, verdict, with_own_answer

FORMS = [Form(dtype, name) for dtype in ("float32", "bfloat16", "float16") for name in ("none", "int8", "nf4")]
ANYTHING = Allowed(math.inf, math.inf)
forms = st.sampled_from(FORMS)
encodings = st.sampled_from(list(BY_ENCODING))


def within(one: Allowed, other: Allowed) -> bool:
    """Whether all that one allows is allowed by the other."""
    return one.typical <= other.typical and one.largest <= other.largest


# -- what is allowed --------------------------------------------------------------------------------------------------


@given(forms, forms)
def test_what_is_allowed_does_not_depend_on_which_of_both_is_the_witness(one: Form, other: Form):
    assert allowed_between(one, other) == allowed_between(other, one)


@given(forms, st.lists(forms), forms, encodings)
def test_a_further_server_or_encoding_never_narrows_what_is_allowed(
    one: Form, others: list[Form], further: Form, encoding: str
):
    allowed = allowed_among(one, others)
    assert within(allowed, allowed_among(one, [*others, further], encoding=encoding))
    assert all(within(allowed_between(one, other), allowed) for other in others)


def test_more_is_allowed_the_more_is_rounded():
    widening = [EXACT, ROUNDED, BOTH_NF4, INT8_STATES, BOTH_INT8, ONE_INT8, ONE_NF4]
    assert all(within(*pair) for pair in itertools.pairwise(widening))
    exact, rounded = Form("float32", "none"), Form("bfloat16", "none")
    int8, nf4 = Form("bfloat16", "int8"), Form("bfloat16", "nf4")
    assert allowed_between(exact, exact) == EXACT
    assert allowed_between(exact, rounded) == allowed_between(rounded, rounded) == ROUNDED
    assert allowed_between(int8, int8) == BOTH_INT8
    assert allowed_between(int8, exact) == allowed_between(int8, rounded) == ONE_INT8
    assert {allowed_between(nf4, each) for each in (exact, rounded, int8)} == {ONE_NF4}
    assert allowed_between(nf4, nf4) == ROUNDED
    assert allowed_between(nf4, Form("float32", "nf4")) == BOTH_NF4


distance = st.floats(0, 10)


@given(st.lists(distance, min_size=1), st.tuples(distance, distance), st.tuples(distance, distance))
def test_what_is_alike_stays_alike_if_more_is_allowed(
    found: list[float], one: tuple[float, float], other: tuple[float, float]
):
    allowed = Allowed(*one)
    if are_alike(found, allowed):
        assert are_alike(found, allowed.either(Allowed(*other)))
        assert typical(found) <= allowed.typical


@given(st.lists(distance), st.lists(distance))
def test_one_distance_that_is_no_number_is_never_alike(before: list[float], after: list[float]):
    found = [*before, math.nan, *after]
    assert typical(found) == math.inf
    assert not are_alike(found, Allowed(1e300, 1e300))


def test_one_token_far_away_is_found_among_many_that_are_near():
    near = [0.0] * 255
    assert are_alike(near, ROUNDED)
    assert not are_alike([*near, ROUNDED.largest * 1.01], ROUNDED)
    assert not are_alike([ROUNDED.typical * 1.01] * 8, ROUNDED)


# -- distances --------------------------------------------------------------------------------------------------------


def outputs(seed: int = 0, *, large: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs [1, 8, 64] of some blocks. The first channel is `large` times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    inputs, changes = (torch.randn(1, 8, 64, generator=generator) for _ in range(2))
    changes[..., 0] *= large
    return inputs, inputs + changes


def test_equal_outputs_are_at_no_distance_and_those_of_other_inputs_far_away():
    inputs, witnessed = outputs()
    assert distances(witnessed, witnessed, inputs) == [0.0] * 8
    assert min(distances(inputs, witnessed, inputs)) >= 1  # all blocks skipped
    assert min(distances(outputs(1)[1], witnessed, inputs)) > 1


def test_padding_is_not_compared_and_changes_nothing():
    inputs, witnessed = (torch.cat([each, each]) for each in outputs())
    claimed = witnessed + 0.01 * torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :5] = 0
    kept = distances(claimed, witnessed, inputs, mask)
    assert len(kept) == 11
    for spoilt in (claimed, witnessed, inputs):
        spoilt[1, :5] = math.nan
    assert distances(claimed, witnessed, inputs, mask) == kept


@pytest.mark.parametrize("large", [1.0, 300.0])
def test_a_lie_in_small_channels_does_not_hide_behind_a_large_one(large: float):
    inputs, witnessed = outputs(large=large)
    claimed = witnessed.clone()
    claimed[..., 1:] = inputs[..., 1:]
    assert min(distances(claimed, witnessed, inputs)) > ONE_INT8.typical


def test_a_lie_in_the_large_channel_alone_is_seen_as_well():
    inputs, witnessed = outputs(large=300.0)
    claimed = witnessed.clone()
    claimed[..., 0] = inputs[..., 0]
    assert sorted(distances(claimed, witnessed, inputs))[4] > 0.9


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_numbers_that_are_not_finite_are_never_alike(value: float, which: int):
    inputs, witnessed = outputs()
    pair = [witnessed.clone(), witnessed.clone()]
    pair[which][0, 3, 5] = value
    found = distances(pair[0], pair[1], inputs)
    assert not are_alike(found, Allowed(1e300, 1e300))


def test_outputs_of_blocks_that_change_nothing_can_be_compared():
    inputs, _ = outputs()
    assert distances(inputs, inputs, inputs) == [0.0] * 8
    assert not are_alike(distances(inputs + 1e-3, inputs, inputs), ONE_NF4)


# -- who is blamed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("like_witness", "like_second", "witnesses_alike", "expected"),
    [
        *((True, second, alike, Verdict.CLEAN) for second in (None, True, False) for alike in (None, True, False)),
        (False, None, None, Verdict.UNSETTLED),
        (False, True, True, Verdict.CLEAN),
        (False, True, False, Verdict.WITNESS_LIED),
        (False, False, True, Verdict.LIED),
        (False, False, False, Verdict.UNSETTLED),
    ],
)
def test_a_server_is_blamed_only_if_two_others_agree(
    like_witness: bool, like_second: bool | None, witnesses_alike: bool | None, expected: Verdict
):
    found = verdict(like_witness=like_witness, like_second=like_second, witnesses_alike=witnesses_alike)
    assert found is expected
    assert found.clears == (like_witness or bool(like_second))


@pytest.mark.parametrize("found", Verdict)
@pytest.mark.parametrize("like_witness", [True, False])
def test_a_server_that_answers_the_client_rightly_was_misled(found: Verdict, like_witness: bool):
    changed = with_own_answer(found, like_witness=like_witness)
    assert changed is (Verdict.MISLED if found is Verdict.LIED and like_witness else found)


# -- what audits cost -------------------------------------------------------------------------------------------------

candidates = st.builds(Candidate, st.integers(8, 256), st.floats(0.1, 500), st.integers(0, 3), st.booleans())
steps = st.tuples(st.integers(1, 300), st.integers(1, 30), st.lists(candidates, max_size=4))


@given(st.lists(steps, max_size=60), st.sampled_from([0.03, 0.3]), st.integers())
def test_audits_cost_no_more_than_their_part_of_the_decoding_but_for_first_ones(
    played: list[tuple[int, int, list[Candidate]]], rate: float, seed: int
):
    budget, rng = AuditBudget(rate), random.Random(seed)
    decoded = spent = first = 0.0
    for num_tokens, num_blocks, some in played:
        decoded += num_tokens * num_blocks
        before, budget = budget, budget.earned(num_tokens, num_blocks)
        assert (
            before.credit
            <= budget.credit
            <= max(before.credit, max(rate * MOST_CREDIT_TOKENS, num_tokens) * num_blocks)
        )
        index = next_audit(some, budget, rng)
        if index is not None:
            budget = budget.spent(some[index].cost)
            spent += some[index].cost
            first += some[index].cost if some[index].is_new else 0.0
        assert spent <= first + rate * decoded + 1e-6
        if index is not None and not some[index].is_new:  # first ones were paid back before any other was made
            assert spent <= rate * decoded + 1e-6


def test_after_a_long_pause_there_is_no_burst_of_audits():
    budget = AuditBudget(0.3)
    for _ in range(1000):
        budget = budget.earned(100, 4)
    assert budget.credit == 0.3 * MOST_CREDIT_TOKENS * 4
    assert budget.earned(100, 1) == budget  # and what was saved is not lost with fewer blocks


NEW, USED = Candidate(64, 50.0, 0, True), Candidate(64, 50.0, 1, True)


def test_a_new_server_is_audited_whatever_it_costs_once_it_is_due():
    rng = random.Random(0)
    poor = AuditBudget(0.03, credit=-1000.0)
    assert next_audit([USED, replace(NEW, is_due=False), NEW, NEW], poor, rng) == 2
    assert next_audit([USED, replace(NEW, is_due=False)], poor, rng) is None
    assert next_audit([replace(NEW, is_due=False)], AuditBudget(0.03, credit=1000.0), rng) is None
    assert next_audit([NEW], AuditBudget(0.0, credit=1000.0), rng) is None
    assert next_audit([], poor, rng) is None


def test_later_audits_are_made_as_far_as_they_can_be_paid():
    rng = random.Random(0)
    assert next_audit([USED], AuditBudget(0.03, credit=49.9), rng) is None
    assert next_audit([USED], AuditBudget(0.03, credit=50.0), rng) == 0
    dear = replace(USED, cost=51.0)
    assert {next_audit([dear, USED, dear], AuditBudget(0.03, credit=50.0), rng) for _ in range(50)} == {1}


def test_servers_are_audited_the_more_the_less_is_known_of_them():
    rng, budget = random.Random(0), AuditBudget(0.03, credit=1000.0)

    def share(one: Candidate, other: Candidate) -> float:
        return sum(next_audit([one, other], budget, rng) == 0 for _ in range(2000)) / 2000

    assert share(USED, USED) == pytest.approx(0.5, abs=0.05)
    assert share(replace(USED, num_tokens=192), USED) == pytest.approx(0.75, abs=0.05)
    assert share(USED, replace(USED, num_clean=9)) == pytest.approx(0.75, abs=0.05)
    assert share(replace(USED, num_clean=100), USED) > 0.02  # none is ever safe from them


speeds = st.none() | st.floats(1e-3, 1e9)


@given(st.integers(1, 256), st.integers(1, 80), speeds, speeds)
def test_what_servers_announce_makes_audits_neither_free_nor_dearer_than_decoding(
    num_tokens: int, num_blocks: int, decode: float | None, prefill: float | None
):
    cost = audit_cost(num_tokens, num_blocks, decode_speed=decode, prefill_speed=prefill)
    assert num_tokens * num_blocks / MOST_SPEEDUP <= cost <= num_tokens * num_blocks
    if decode is None or prefill is None:
        assert cost == num_tokens * num_blocks / USUAL_SPEEDUP


# -- evidence ---------------------------------------------------------------------------------------------------------

EVIDENCE = Evidence(
    peer="12D3Liar",
    model="stories",
    blocks="0:4",
    position=12,
    num_tokens=16,
    typical=math.inf,
    largest=2.5,
    allowed_typical=0.03,
    allowed_largest=0.12,
    witnesses=("12D3One", "12D3Two"),
    found_at=1.8e9,
)


def book(folder: Path) -> AuditBook:
    return AuditBook(0.03, rng=random.Random(0), folder=folder)


def test_a_liar_is_shut_out_until_its_evidence_is_deleted(tmp_path: Path):
    folder = tmp_path / "not" / "there" / "yet"
    book(folder).shut_out(EVIDENCE)
    (file,) = folder.iterdir()
    assert file.name == "12D3Liar.json"
    kept = json.loads(file.read_text())
    assert Evidence(**{**kept, "witnesses": tuple(kept["witnesses"])}) == EVIDENCE
    assert book(folder).liars == {"12D3Liar"}
    file.unlink()
    assert not book(folder).liars


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"peer": "other"', "Expecting"),
        (b"\xff\xfe\x00", "decode"),
        (b"[]", "mapping"),
        (b"{}", "witnesses"),
        (b'{"peer": "other", "witnesses": []}', "missing"),
        (b"[" * MAX_EVIDENCE_BYTES, "recursion"),
        (json.dumps({**vars(EVIDENCE), "peer": "other", "more": 1}).encode(), "more"),
        (json.dumps({**vars(EVIDENCE), "peer": "other", "model": "m" * MAX_EVIDENCE_BYTES}).encode(), "too large"),
        (json.dumps({**vars(EVIDENCE), "peer": "third"}).encode(), "its name is not the peer's"),
    ],
)
def test_a_file_that_is_no_evidence_is_named_and_leaves_the_others_valid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, reason: str
):
    book(tmp_path).shut_out(EVIDENCE)
    (tmp_path / "other.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert book(tmp_path).liars == {"12D3Liar"}
    assert "other.json is no evidence against a server" in caplog.text
    assert reason in caplog.text


def test_evidence_that_cannot_be_written_counts_for_this_client(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    nowhere = book(tmp_path / "file" / "folder")
    nowhere.shut_out(EVIDENCE)
    assert nowhere.liars == {"12D3Liar"}
    assert "the evidence against 12D3Liar cannot be kept" in caplog.text


def test_a_draft_of_evidence_that_cannot_be_kept_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "12D3Liar.json").mkdir()
    blocked = book(tmp_path)
    blocked.shut_out(EVIDENCE)
    assert blocked.liars == {"12D3Liar"}
    assert [file.name for file in tmp_path.iterdir()] == ["12D3Liar.json"]
    assert "cannot be kept" in caplog.text


def test_evidence_against_a_witness_names_the_accused_in_its_place():
    found = EVIDENCE.against("12D3One", "12D3Liar")
    assert (found.peer, found.witnesses) == ("12D3One", ("12D3Liar", "12D3Two"))


def test_a_new_server_is_due_after_some_tokens_and_again_some_time_after_an_audit_that_led_to_nothing(
    tmp_path: Path,
):
    audits = book(tmp_path)

    def tokens_until_due() -> int:
        for count in range(FIRST_AUDIT_TOKENS + 1):
            if audits.candidate("s", num_tokens=8, cost=1.0).is_due:
                return count
            audits.record_use(["s"], num_decoded=1)
        raise AssertionError("it is never due")

    assert 1 <= tokens_until_due() <= FIRST_AUDIT_TOKENS
    audits.postpone("s")
    assert 1 <= tokens_until_due() <= FIRST_AUDIT_TOKENS
    for _ in range(MOST_FAILED - 1):
        audits.record_failed("s")
        assert tokens_until_due() == 0  # others are asked at once
    audits.record_failed("s")
    assert 1 <= tokens_until_due() <= FIRST_AUDIT_TOKENS
    audits.record_failed("s")
    assert tokens_until_due() == 0
    audits.record_clean("s")
    assert not audits.candidate("s", num_tokens=8, cost=1.0).is_new
