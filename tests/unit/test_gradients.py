"""Sums of gradients over the microbatches of a batch, in all orders of arrival."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.training.gradients import FactorSums
from shoal.model.peft.factors import FactorGradients

ROUNDED = (1e8, 1.0, -1e8, 3.0, 1e-3)
"""Numbers whose sum depends on the order."""


def found(number: int, *, dtype: torch.dtype = torch.float32) -> dict[int, FactorGradients]:
    """What the microbatch of this number finds."""
    unused = frozenset({0, number % 2})
    return {block: FactorGradients(torch.full((2,), ROUNDED[number] + block, dtype=dtype), unused) for block in (0, 2)}


@given(order=st.permutations(range(len(ROUNDED))))
def test_sums_are_made_in_the_order_of_the_batch(order: list[int]):
    sums, expected = FactorSums(), FactorSums()
    for number in range(len(ROUNDED)):
        expected.add(number, found(number))
    for number in order:
        sums.add(number, found(number))
    assert sums.blocks.keys() == {0, 2}
    for block, each in sums.blocks.items():
        assert torch.equal(each.values, expected.blocks[block].values)
        assert each.unused == {0}


def test_only_what_came_before_its_turn_is_kept():
    sums, kept = FactorSums(), []
    for number in (0, 1, 4, 2):
        own = found(number)
        kept.append(weakref.ref(own[0].values))
        sums.add(number, own)
    del own
    assert [each() is not None for each in kept] == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_numbers_are_not_lost_in_a_short_dtype(dtype: torch.dtype):
    sums = FactorSums()
    for number in range(1000):
        sums.add(number, found(1, dtype=dtype))
    assert sums.blocks[0].values.tolist() == [1000.0, 1000.0]
