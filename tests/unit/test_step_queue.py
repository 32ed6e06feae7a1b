"""Whoever sends a session's steps, and in whatever order they come, each is begun once and in its turn."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol import MAX_STEPS_AHEAD, Rewind, Step
from shoal.server.refusals import Refused
from shoal.server.rpc.step_queue import MAX_QUEUED_TOKENS, ReceivedStep, StepQueue
from shoal.server.step_inputs import StepInputs

LINK, OTHER_LINK = "0" * 32, "1" * 32


def received(
    position: int, num_tokens: int = 1, *, epoch: int = 0, link: str | None = None, batch_size: int = 1
) -> ReceivedStep:
    hidden_BTD = torch.zeros(batch_size, num_tokens, 1)
    return ReceivedStep(Step(epoch=epoch, position=position), StepInputs(hidden_BTD, None, None), link=link)


def taken(queue: StepQueue) -> list[ReceivedStep]:
    """All that is ready."""
    steps = []
    while queue.is_ready:
        steps.append(queue.take())
    return steps


def keys(steps: list[ReceivedStep]) -> list[tuple[int, int]]:
    return [each.key for each in steps]


@given(st.data())
def test_steps_are_begun_once_and_in_order_however_they_come(data: st.DataObject):
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=MAX_STEPS_AHEAD))
    links = st.sampled_from([None, LINK])
    steps = [received(sum(lengths[:n]), lengths[n], link=data.draw(links)) for n in range(len(lengths))]
    copies = data.draw(st.lists(st.sampled_from(steps), max_size=10))
    queue, running = StepQueue(0, 0), list[ReceivedStep]()
    for step in data.draw(st.permutations([*steps, *copies])):
        queue.add(step)
        if data.draw(st.booleans()):
            running += taken(queue)
    running += taken(queue)
    assert keys(running) == keys(steps)
    assert queue.position == sum(lengths)


@given(st.data())
def test_after_a_rewind_only_the_steps_of_its_epoch_count(data: st.DataObject):
    """The steps of three epochs are shuffled among each other, each epoch's not before its rewind or before that."""
    queue, running, position = StepQueue(0, 0), list[ReceivedStep](), 0
    expected: list[tuple[int, int]] = []
    for epoch in range(1, 4):
        position = data.draw(st.integers(0, position))
        number = data.draw(st.integers(0, 5))
        steps = [received(position + n, epoch=epoch, link=LINK) for n in range(number)]
        early = data.draw(st.integers(0, number))
        for step in data.draw(st.permutations(steps[:early])):
            assert not queue.add(step)
        running += taken(queue)
        queue.rewind(Rewind(epoch=epoch, position=position))
        old = [received(n, epoch=epoch - 1) for n in range(data.draw(st.integers(0, 5)))]
        for step in data.draw(st.permutations(steps[early:] + old)):
            assert not queue.add(step)
        running += taken(queue)
        expected += keys(steps)
        position += number
    assert keys(running) == expected
    assert (queue.epoch, queue.position) == (3, position)


def test_the_last_step_again_is_told_from_older_ones():
    queue = StepQueue(0, 0)
    assert [queue.add(received(n)) for n in range(3)] == [False] * 3
    taken(queue)
    assert [queue.add(received(n)) for n in range(3)] == [False, False, True]
    queue.again(received(2))
    assert keys(taken(queue)) == [(0, 2)]
    queue.rewind(Rewind(epoch=1, position=2))
    assert not queue.add(received(2))
    assert not queue.is_ready


@pytest.mark.parametrize("epoch", [0, 4, 5])
def test_an_epoch_that_is_not_later_than_all_before_is_refused(epoch: int):
    with pytest.raises(Refused, match="after epoch 5"):
        StepQueue(5, 0).rewind(Rewind(epoch=epoch, position=0))


rows = st.none() | st.lists(st.integers(0, 2), min_size=3, max_size=3).map(tuple)


@given(st.lists(rows, max_size=5))
def test_rearrangements_without_a_step_between_them_become_one(changes: list[tuple[int, ...] | None]):
    queue, expected = StepQueue(0, 3), [0, 1, 2]
    for epoch, change in enumerate(changes, start=1):
        queue.rewind(Rewind(epoch=epoch, position=3, rows=change))
        expected = expected if change is None else [expected[row] for row in change]
    queue.add(received(3, epoch=len(changes)))
    queue.add(received(4, epoch=len(changes)))
    first, second = taken(queue)
    assert list(first.rows or (0, 1, 2)) == expected
    assert second.rows is None


def test_what_begins_anew_continues_nothing():
    queue = StepQueue(0, 3)
    queue.rewind(Rewind(epoch=1, position=3, rows=(1, 0)))
    queue.rewind(Rewind(epoch=2, position=0))
    queue.add(received(0, epoch=2))
    assert queue.take().rows is None


def test_a_step_that_could_not_be_computed_is_as_if_it_had_never_come():
    queue = StepQueue(0, 3)
    queue.rewind(Rewind(epoch=1, position=3, rows=(1, 0)))
    queue.add(received(3, epoch=1, link=LINK))
    queue.drop(queue.take())
    assert not queue.is_ready
    assert not queue.add(received(3, epoch=1))
    assert queue.take().rows == (1, 0)
    assert queue.position == 4


def test_a_rearrangement_is_not_lost_with_its_step_when_a_rewind_comes_meanwhile():
    queue = StepQueue(0, 3)
    queue.rewind(Rewind(epoch=1, position=3, rows=(1, 0)))
    queue.add(received(3, epoch=1, link=LINK))
    step = queue.take()
    queue.rewind(Rewind(epoch=2, position=2, rows=(0, 0)))
    queue.drop(step)
    queue.add(received(2, epoch=2))
    assert queue.take().rows == (1, 1)


def held(queue: StepQueue) -> list[ReceivedStep]:
    return list(queue.waiting)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.sampled_from([1, 512, 1024])), max_size=60))
def test_what_is_pushed_waits_in_limited_numbers_and_raises_nothing(pushed: list[tuple[int, int, int]]):
    queue = StepQueue(0, 0)
    for epoch, position, num_tokens in pushed:
        assert not queue.add(received(position, num_tokens, epoch=epoch, link=LINK))
        assert len(held(queue)) <= MAX_STEPS_AHEAD
        assert sum(each.size for each in held(queue)) <= MAX_QUEUED_TOKENS


def test_a_client_that_sends_too_much_too_early_is_refused():
    queue = StepQueue(0, 0)
    for n in range(1, MAX_STEPS_AHEAD + 1):
        queue.add(received(n))
    queue.add(received(3))  # waits already
    with pytest.raises(Refused, match="at once"):
        queue.add(received(99))
    queue = StepQueue(0, 0)
    for n in range(1, 9):
        queue.add(received(n, 1, batch_size=1024))
    with pytest.raises(Refused, match="at once"):
        queue.add(received(9))


def test_the_clients_own_steps_go_before_those_that_are_pushed():
    queue = StepQueue(0, 0)
    for n in range(1, 40):
        queue.add(received(n, link=LINK))
    own = received(5)
    queue.add(own)
    assert [each for each in held(queue) if each.key == own.key] == [own]
    queue.add(received(5, link=LINK))
    queue.add(received(60))
    assert {each.link for each in held(queue)} == {None}


def test_what_one_server_has_pushed_can_be_forgotten():
    queue = StepQueue(0, 0)
    queue.add(received(1, link=LINK))
    queue.add(received(1, epoch=7, link=LINK))
    queue.add(received(2, link=OTHER_LINK))
    queue.add(received(3))
    queue.forget(LINK)
    assert keys(held(queue)) == [(0, 2), (0, 3)]
