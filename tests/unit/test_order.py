"""Whoever sends a session's steps, and in whatever order they come, each is begun once and in its turn."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol import MAX_STEPS_AHEAD, Rewind, Step
from shoal.server.order import TOKENS_AHEAD, Arrived, Order
from shoal.server.refusal import Refused

LINK, OTHER_LINK = "0" * 32, "1" * 32


def arrived(
    position: int, num_tokens: int = 1, *, epoch: int = 0, link: str | None = None, batch_size: int = 1
) -> Arrived:
    hidden_BTD = torch.zeros(batch_size, num_tokens, 1)
    return Arrived(Step(epoch=epoch, position=position), {"hidden": hidden_BTD}, link=link)


def taken(order: Order) -> list[Arrived]:
    """All that is ready."""
    steps = []
    while order.is_ready:
        steps.append(order.take())
    return steps


def keys(steps: list[Arrived]) -> list[tuple[int, int]]:
    return [each.key for each in steps]


@given(st.data())
def test_steps_are_begun_once_and_in_order_however_they_come(data: st.DataObject):
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=MAX_STEPS_AHEAD))
    links = st.sampled_from([None, LINK])
    steps = [arrived(sum(lengths[:n]), lengths[n], link=data.draw(links)) for n in range(len(lengths))]
    copies = data.draw(st.lists(st.sampled_from(steps), max_size=10))
    order, begun = Order(0, 0), list[Arrived]()
    for step in data.draw(st.permutations([*steps, *copies])):
        order.add(step)
        if data.draw(st.booleans()):
            begun += taken(order)
    begun += taken(order)
    assert keys(begun) == keys(steps)
    assert order.position == sum(lengths)


@given(st.data())
def test_after_a_rewind_only_the_steps_of_its_epoch_count(data: st.DataObject):
    """The steps of three epochs are shuffled among each other, each epoch's not before its rewind or before that."""
    order, begun, position = Order(0, 0), list[Arrived](), 0
    expected: list[tuple[int, int]] = []
    for epoch in range(1, 4):
        position = data.draw(st.integers(0, position))
        number = data.draw(st.integers(0, 5))
        steps = [arrived(position + n, epoch=epoch, link=LINK) for n in range(number)]
        early = data.draw(st.integers(0, number))
        for step in data.draw(st.permutations(steps[:early])):
            assert not order.add(step)
        begun += taken(order)
        order.rewind(Rewind(epoch=epoch, position=position))
        old = [arrived(n, epoch=epoch - 1) for n in range(data.draw(st.integers(0, 5)))]
        for step in data.draw(st.permutations(steps[early:] + old)):
            assert not order.add(step)
        begun += taken(order)
        expected += keys(steps)
        position += number
    assert keys(begun) == expected
    assert (order.epoch, order.position) == (3, position)


def test_the_last_step_again_is_told_from_older_ones():
    order = Order(0, 0)
    assert [order.add(arrived(n)) for n in range(3)] == [False] * 3
    taken(order)
    assert [order.add(arrived(n)) for n in range(3)] == [False, False, True]
    order.again(arrived(2))
    assert keys(taken(order)) == [(0, 2)]
    order.rewind(Rewind(epoch=1, position=2))
    assert not order.add(arrived(2))
    assert not order.is_ready


@pytest.mark.parametrize("epoch", [0, 4, 5])
def test_an_epoch_that_is_not_later_than_all_before_is_refused(epoch: int):
    with pytest.raises(Refused, match="after epoch 5"):
        Order(5, 0).rewind(Rewind(epoch=epoch, position=0))


rows = st.none() | st.lists(st.integers(0, 2), min_size=3, max_size=3).map(tuple)


@given(st.lists(rows, max_size=5))
def test_rearrangements_without_a_step_between_them_become_one(changes: list[tuple[int, ...] | None]):
    order, expected = Order(0, 3), [0, 1, 2]
    for epoch, change in enumerate(changes, start=1):
        order.rewind(Rewind(epoch=epoch, position=3, rows=change))
        expected = expected if change is None else [expected[row] for row in change]
    order.add(arrived(3, epoch=len(changes)))
    order.add(arrived(4, epoch=len(changes)))
    first, second = taken(order)
    assert list(first.rows or (0, 1, 2)) == expected
    assert second.rows is None


def test_what_begins_anew_continues_nothing():
    order = Order(0, 3)
    order.rewind(Rewind(epoch=1, position=3, rows=(1, 0)))
    order.rewind(Rewind(epoch=2, position=0))
    order.add(arrived(0, epoch=2))
    assert order.take().rows is None


def test_a_step_that_could_not_be_computed_is_as_if_it_had_never_come():
    order = Order(0, 3)
    order.rewind(Rewind(epoch=1, position=3, rows=(1, 0)))
    order.add(arrived(3, epoch=1, link=LINK))
    order.drop(order.take())
    assert not order.is_ready
    assert not order.add(arrived(3, epoch=1))
    assert order.take().rows == (1, 0)
    assert order.position == 4


def test_a_rearrangement_is_not_lost_with_its_step_when_a_rewind_comes_meanwhile():
    order = Order(0, 3)
    order.rewind(Rewind(epoch=1, position=3, rows=(1, 0)))
    order.add(arrived(3, epoch=1, link=LINK))
    step = order.take()
    order.rewind(Rewind(epoch=2, position=2, rows=(0, 0)))
    order.drop(step)
    order.add(arrived(2, epoch=2))
    assert order.take().rows == (1, 1)


def held(order: Order) -> list[Arrived]:
    return list(order._waiting.values())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.sampled_from([1, 512, 1024])), max_size=60))
def test_what_is_pushed_waits_in_limited_numbers_and_raises_nothing(pushed: list[tuple[int, int, int]]):
    order = Order(0, 0)
    for epoch, position, num_tokens in pushed:
        assert not order.add(arrived(position, num_tokens, epoch=epoch, link=LINK))
        assert len(held(order)) <= MAX_STEPS_AHEAD
        assert sum(each.size for each in held(order)) <= TOKENS_AHEAD


def test_a_client_that_sends_too_much_too_early_is_refused():
    order = Order(0, 0)
    for n in range(1, MAX_STEPS_AHEAD + 1):
        order.add(arrived(n))
    order.add(arrived(3))  # waits already
    with pytest.raises(Refused, match="at once"):
        order.add(arrived(99))
    order = Order(0, 0)
    for n in range(1, 9):
        order.add(arrived(n, 1, batch_size=1024))
    with pytest.raises(Refused, match="at once"):
        order.add(arrived(9))


def test_the_clients_own_steps_go_before_those_that_are_pushed():
    order = Order(0, 0)
    for n in range(1, 40):
        order.add(arrived(n, link=LINK))
    own = arrived(5)
    order.add(own)
    assert [each for each in held(order) if each.key == own.key] == [own]
    order.add(arrived(5, link=LINK))
    order.add(arrived(60))
    assert {each.link for each in held(order)} == {None}


def test_what_one_server_has_pushed_can_be_forgotten():
    order = Order(0, 0)
    order.add(arrived(1, link=LINK))
    order.add(arrived(1, epoch=7, link=LINK))
    order.add(arrived(2, link=OTHER_LINK))
    order.add(arrived(3))
    order.forget(LINK)
    assert keys(held(order)) == [(0, 2), (0, 3)]
