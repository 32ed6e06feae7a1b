"""What a server saves of forward passes: its budget is used, given back, and never exceeded."""

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

MAX_BYTES = 100


def block(num_bytes: int) -> BlockActivations:
    return BlockActivations(torch.zeros(1), torch.zeros(1), num_bytes)


def left(budget: ByteBudget) -> int:
    """The most bytes that can be reserved."""
    size = next(size for size in range(MAX_BYTES, -1, -1) if budget.reserve(size))
    budget.release(size)
    return size


def saved_in(budget: ByteBudget, *sizes: int) -> SavedActivations:
    return filled(SavedActivations(None, budget), *sizes)  # type: ignore[arg-type]


def filled(saved: SavedActivations, *sizes: int) -> SavedActivations:
    for size in sizes:
        saved.add(block(size))
    return saved


def test_a_block_that_does_not_fit_keeps_its_inputs_only():
    budget = ByteBudget(MAX_BYTES)
    saved = saved_in(budget, 60, 60, 30)
    assert [each.outputs_BTD is None for each in saved.of_blocks] == [False, True, False]
    assert saved.is_complete
    assert left(budget) == 6
    assert [saved.pop().num_bytes for _ in range(3)] == [30, 4, 60]
    assert left(budget) == MAX_BYTES


def test_a_pass_whose_inputs_do_not_fit_is_not_complete():
    budget = ByteBudget(MAX_BYTES)
    saved = saved_in(budget, 98, 60)
    assert not saved.is_complete
    assert saved.of_blocks[1].inputs_BTD is not None  # for a backward pass that follows at once
    saved.drop()
    assert left(budget) == MAX_BYTES


def test_a_pass_that_is_dropped_while_it_is_computed_takes_no_more_of_the_budget():
    budget = ByteBudget(MAX_BYTES)
    saved = saved_in(budget, 60)
    saved.drop()
    saved.drop()
    saved.add(block(20))
    assert saved.pop().outputs_BTD is None
    assert left(budget) == MAX_BYTES


@dataclass
class Weights:
    """The part of a body that `ActivationStore` uses."""

    def parameters(self) -> Any:
        return iter(())


def new_store(*, seconds: float = 10.0) -> ActivationStore:
    return ActivationStore(Weights(), max_bytes=MAX_BYTES, seconds=seconds)  # type: ignore[arg-type]


def save(store: ActivationStore, peer: str, name: str, size: int) -> SavedActivations:
    saved = filled(store.new(None), size)  # type: ignore[arg-type]
    store.save(peer, name, saved)
    return saved


def test_a_pass_is_given_to_the_client_that_made_it_and_once():
    async def scene() -> None:
        store = new_store()
        saved = save(store, "a", "one", 60)
        assert store.take("b", "one") is None
        assert store.take("a", "one") is saved
        assert store.take("a", "one") is None
        saved.drop()
        assert left(store.budget) == MAX_BYTES

    virtual_time.run(scene())


def test_an_old_pass_is_dropped_when_a_new_one_begins():
    async def scene() -> None:
        store = new_store(seconds=10.0)
        save(store, "a", "old", 60)
        await asyncio.sleep(9)
        save(store, "a", "young", 10)
        await asyncio.sleep(2)
        save(store, "b", "new", 20)
        assert store.take("a", "old") is None
        assert left(store.budget) == 70

    virtual_time.run(scene())


def test_an_old_pass_makes_room_for_a_new_one():
    async def scene() -> None:
        store = new_store(seconds=10.0)
        save(store, "a", "abandoned", MAX_BYTES)
        await asyncio.sleep(11)
        assert save(store, "a", "new", MAX_BYTES).is_complete

    virtual_time.run(scene())


@given(st.lists(st.tuples(st.sampled_from(["save", "take", "leave"]), st.sampled_from("ab"), st.sampled_from("xy"))))
def test_the_budget_in_use_is_that_of_the_passes_in_the_store(acts: list[tuple[str, str, str]]):
    async def scene() -> None:
        store, here = new_store(), dict[tuple[str, str], int]()
        for size, (act, peer, name) in enumerate(acts, start=1):
            match act:
                case "save":
                    saved = save(store, peer, name, size)
                    here[peer, name] = saved.of_blocks[0].num_bytes
                case "take":
                    found = store.take(peer, name)
                    assert (found is not None) == ((peer, name) in here)
                    here.pop((peer, name), None)
                    if found is not None:
                        found.drop()
                case _:
                    store.release(peer)
                    here = {key: size for key, size in here.items() if key[0] != peer}
            assert left(store.budget) == MAX_BYTES - sum(here.values())

    virtual_time.run(scene())


@pytest.mark.parametrize("shared", [False, True])
def test_the_bytes_that_autograd_saves_are_counted_once_and_without_weights(shared: bool):
    weight = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8, requires_grad=True)
    pointers = frozenset({weight.untyped_storage().data_ptr()}) if shared else frozenset[int]()
    with counting_saved_bytes(pointers) as num_bytes:
        y = x @ weight
        (y * y).sum()
    expected = x.nbytes + y.nbytes + (0 if shared else weight.nbytes)
    assert num_bytes() == expected


def test_an_operator_that_saves_its_own_output_is_freed():
    x = torch.ones(4, requires_grad=True)
    with counting_saved_bytes(frozenset()):
        y = x.exp()
    reference = weakref.ref(x)
    del x, y
    gc.collect()
    assert reference() is None
