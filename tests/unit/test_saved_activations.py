"""What a server keeps of forward passes: its room is used, given back, and never used twice."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.training.saved_activations import (
    ActivationStore,
    BlockActivations,
    ByteBudget,
    SavedActivations,
    counting_saved_bytes,
)

from . import virtual_time

ROOM = 100


def graph(num_bytes: int) -> BlockActivations:
    return BlockActivations(torch.zeros(1), torch.zeros(1), num_bytes)


def left(room: ByteBudget) -> int:
    """How much is left, as whoever takes it sees it."""
    size = next(size for size in range(ROOM, -1, -1) if room.take(size))
    room.release(size)
    return size


def kept_in(room: ByteBudget, *sizes: int) -> SavedActivations:
    return filled(SavedActivations(None, room), *sizes)  # type: ignore[arg-type]


def filled(kept: SavedActivations, *sizes: int) -> SavedActivations:
    for size in sizes:
        kept.add(graph(size))
    return kept


def test_what_does_not_fit_keeps_only_what_went_in():
    room = ByteBudget(ROOM)
    kept = kept_in(room, 60, 60, 30)
    assert [each.left_BTD is None for each in kept.graphs] == [False, True, False]
    assert kept.is_complete
    assert left(room) == 6
    assert [kept.pop().num_bytes for _ in range(3)] == [30, 4, 60]
    assert left(room) == ROOM


def test_a_pass_of_which_not_even_the_inputs_fit_is_not_whole():
    room = ByteBudget(ROOM)
    kept = kept_in(room, 98, 60)
    assert not kept.is_complete
    assert kept.graphs[1].entered_BTD is not None  # for whoever goes back at once
    kept.drop()
    assert left(room) == ROOM


def test_what_is_dropped_while_it_is_computed_takes_no_more_room():
    room = ByteBudget(ROOM)
    kept = kept_in(room, 60)
    kept.drop()
    kept.drop()
    kept.add(graph(20))
    assert kept.pop().left_BTD is None
    assert left(room) == ROOM


@dataclass
class Weights:
    """All that `ActivationStore` asks of a body."""

    def parameters(self) -> Any:
        return iter(())


def passes(*, seconds: float = 10.0) -> ActivationStore:
    return ActivationStore(Weights(), most_bytes=ROOM, seconds=seconds)  # type: ignore[arg-type]


def keep(store: ActivationStore, peer: str, name: str, size: int) -> SavedActivations:
    kept = filled(store.new(None), size)  # type: ignore[arg-type]
    store.keep(peer, name, kept)
    return kept


def test_a_pass_is_given_to_who_made_it_and_once():
    async def scene() -> None:
        store = passes()
        kept = keep(store, "a", "one", 60)
        assert store.take("b", "one") is None
        assert store.take("a", "one") is kept
        assert store.take("a", "one") is None
        kept.drop()
        assert left(store.room) == ROOM

    virtual_time.run(scene())


def test_a_pass_that_nobody_asks_for_goes_when_another_comes():
    async def scene() -> None:
        store = passes(seconds=10.0)
        keep(store, "a", "old", 60)
        await asyncio.sleep(9)
        keep(store, "a", "young", 10)
        await asyncio.sleep(2)
        keep(store, "b", "new", 20)
        assert store.take("a", "old") is None
        assert left(store.room) == 70

    virtual_time.run(scene())


def test_a_pass_that_nobody_asks_for_makes_room_for_one_that_needs_it():
    async def scene() -> None:
        store = passes(seconds=10.0)
        keep(store, "a", "abandoned", ROOM)
        await asyncio.sleep(11)
        assert keep(store, "a", "new", ROOM).is_complete

    virtual_time.run(scene())


@given(st.lists(st.tuples(st.sampled_from(["keep", "take", "leave"]), st.sampled_from("ab"), st.sampled_from("xy"))))
def test_room_is_what_those_who_are_here_have_kept(acts: list[tuple[str, str, str]]):
    async def scene() -> None:
        store, here = passes(), dict[tuple[str, str], int]()
        for size, (act, peer, name) in enumerate(acts, start=1):
            match act:
                case "keep":
                    kept = keep(store, peer, name, size)
                    here[peer, name] = kept.graphs[0].num_bytes
                case "take":
                    found = store.take(peer, name)
                    assert (found is not None) == ((peer, name) in here)
                    here.pop((peer, name), None)
                    if found is not None:
                        found.drop()
                case _:
                    store.release(peer)
                    here = {key: size for key, size in here.items() if key[0] != peer}
            assert left(store.room) == ROOM - sum(here.values())

    virtual_time.run(scene())


@pytest.mark.parametrize("shared", [False, True])
def test_what_autograd_keeps_is_counted_once_and_without_weights(shared: bool):
    weight = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8, requires_grad=True)
    weights = frozenset({weight.untyped_storage().data_ptr()}) if shared else frozenset[int]()
    with counting_saved_bytes(weights) as num_bytes:
        y = x @ weight
        (y * y).sum()
    expected = x.nbytes + y.nbytes + (0 if shared else weight.nbytes)
    assert num_bytes() == expected


def test_an_operator_that_keeps_its_own_output_is_let_go_of():
    x = torch.ones(4, requires_grad=True)
    with counting_saved_bytes(frozenset()):
        y = x.exp()
    there = weakref.ref(x)
    del x, y
    gc.collect()
    assert there() is None
