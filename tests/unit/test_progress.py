"""How far a server has come: what holds after any sequence of events."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.client.decoding.epoch import Epoch, EpochReason
from shoal.client.decoding.pending_step import PendingStep
from shoal.client.decoding.progress import StageProgress, awaited_steps


def step(position: int, num_tokens: int, *, epoch: int = 0, pushed: bool = False) -> PendingStep:
    shape = torch.Size((1, num_tokens, 4))
    return PendingStep(epoch, position, shape, torch.float32, None, 0, 0.1, pushed=pushed)


def next_step(progress: StageProgress, num_tokens: int) -> PendingStep:
    return step(progress.num_requested, num_tokens, epoch=progress.epoch or 0)


def asked(*lengths: int, num_computed: int = 0) -> StageProgress:
    """A server that has computed some tokens, and was asked for steps of these lengths."""
    progress = StageProgress().entered_epoch(0).opened_with(num_computed)
    for length in lengths:
        progress = progress.requested(next_step(progress, length))
    return progress


progresses = st.builds(
    lambda lengths, num_computed: asked(*lengths, num_computed=num_computed),
    st.lists(st.integers(1, 9), max_size=5),
    st.integers(0, 20),
)


def check(progress: StageProgress) -> None:
    """The pending steps cover the tokens from `num_computed` to `num_requested`, without a gap."""
    assert 0 <= progress.num_computed <= progress.num_requested
    ends = [progress.num_computed, *(each.end for each in progress.pending)]
    assert [each.position for each in progress.pending] == ends[:-1]
    assert progress.num_requested == ends[-1]
    assert progress.num_computed or progress.rows is None


EVENTS = ("requested", "answered", "ponged", "unrequested", "rewound", "rearranged", "entered epoch", "disconnected")


def happen(event: str, progress: StageProgress, data: st.DataObject) -> StageProgress:
    match event:
        case "requested":
            return progress.requested(next_step(progress, data.draw(st.integers(1, 9))))
        case "answered":
            return progress.answered() if progress.pending else progress
        case "ponged":
            return progress.ponged(idle=data.draw(st.booleans()))
        case "unrequested":
            return progress.unrequested_from(data.draw(st.integers(0, 60)))
        case "rewound":
            return progress.rewound_to(data.draw(st.integers(0, 60)))
        case "rearranged":
            return progress.rearranged(data.draw(st.permutations(range(3))))
        case "entered epoch":
            return progress.entered_epoch((progress.epoch or 0) + 1)
        case _:
            return progress.disconnected()


@settings(deadline=None)
@given(st.data(), progresses, st.lists(st.sampled_from(EVENTS), max_size=30))
def test_what_is_computed_and_what_is_pending_fit_together_after_any_events(
    data: st.DataObject, progress: StageProgress, events: list[str]
):
    check(progress)
    for event in events:
        progress = happen(event, progress, data)
        check(progress)


@settings(deadline=None)
@given(st.data(), progresses, st.lists(st.sampled_from(EVENTS), max_size=30))
def test_only_an_answer_moves_what_is_computed_up_and_exactly_to_the_end_of_its_step(
    data: st.DataObject, progress: StageProgress, events: list[str]
):
    for event in events:
        before, progress = progress, happen(event, progress, data)
        if event == "answered" and before.pending:
            assert progress.num_computed == before.pending[0].end
            assert progress.pending == before.pending[1:]
        else:
            assert progress.num_computed <= before.num_computed


@settings(deadline=None)
@given(progresses, st.integers(0, 60))
def test_nothing_is_left_beyond_the_position_that_a_server_goes_back_to(progress: StageProgress, position: int):
    back = progress.rewound_to(position)
    assert back.num_computed == back.num_requested == min(progress.num_computed, position)


@settings(deadline=None)
@given(progresses, st.integers(0, 60))
def test_what_is_unrequested_is_requested_again_from_the_same_position(progress: StageProgress, position: int):
    """The steps that end before stay, and none that reaches beyond does, not even one that began before."""
    kept = progress.unrequested_from(position)
    assert kept.num_computed == progress.num_computed
    assert kept.pending == tuple(each for each in progress.pending if each.end <= position)
    dropped = progress.pending[len(kept.pending) :]
    if dropped:
        assert kept.num_requested == dropped[0].position
    for each in dropped:
        kept = kept.requested(replace(each, epoch=1))
    assert kept.num_requested == progress.num_requested


def test_what_a_server_has_computed_is_not_requested_again_when_a_push_before_it_fails():
    progress = asked(4, num_computed=100)
    assert progress.unrequested_from(40).num_requested == 100


@settings(deadline=None)
@given(st.integers(1, 20), st.lists(st.permutations(range(4)), min_size=1, max_size=5))
def test_rearrangements_that_a_server_was_not_told_become_one(num_computed: int, many: list[list[int]]):
    progress, batch = asked(3, num_computed=num_computed), [0, 1, 2, 3]
    for rows in many:
        progress = progress.rearranged(rows)
        batch = [batch[row] for row in rows]
    assert progress.rows == tuple(batch)
    assert not progress.pending
    told = progress.entered_epoch(1)
    assert (told.rows, told.is_rewound) == (None, True)


def test_a_server_that_has_computed_nothing_has_nothing_to_rearrange():
    assert asked(3).rearranged([1, 0]).rows is None
    assert asked(num_computed=5).rearranged([1, 0]).rewound_to(0).rows is None
    assert not asked(3).rewound_to(0).entered_epoch(1).is_rewound


def test_a_server_that_is_disconnected_knows_nothing_and_its_error_can_still_be_judged():
    rewound = asked(3, num_computed=5).entered_epoch(1).requested(step(8, 2, epoch=1))
    assert rewound.disconnected() == StageProgress(is_rewound=True)
    assert rewound.disconnected().entered_epoch(2) == StageProgress(epoch=2)


def test_a_server_accepts_another_epoch_once_nothing_is_pending():
    progress = asked(3)
    assert progress.accepts(0)
    assert not progress.accepts(1)
    assert progress.answered().accepts(1)
    assert progress.awaits(0, 0)
    assert not progress.awaits(1, 0)
    assert not progress.answered().awaits(0, 0)


def test_idle_pongs_are_counted_in_a_row_and_from_the_last_step_on():
    progress = asked(3).ponged(idle=True).ponged(idle=True)
    assert progress.num_idle_pongs == 2
    assert progress.ponged(idle=False).num_idle_pongs == 0
    assert progress.answered().num_idle_pongs == 0
    assert progress.requested(next_step(progress, 1)).num_idle_pongs == 0


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_step_that_leaves_a_gap_or_is_asked_twice_is_a_bug(position: int):
    with pytest.raises(AssertionError):
        asked(3).requested(step(position, 2))


def test_every_reason_begins_the_next_epoch():
    epoch = Epoch()
    for reason in EpochReason:
        epoch.advance(reason)
    assert epoch.number == len(EpochReason)


def test_a_server_owes_a_step_once_the_server_before_it_has_computed_its_inputs():
    first, second = asked(3, 1), asked(3)
    assert awaited_steps([first, second, StageProgress()]) == [first.pending[0], None, None]
    assert awaited_steps([first.answered(), second]) == [first.pending[1], second.pending[0]]
    assert awaited_steps([first.answered().answered(), second.answered()]) == [None, None]
