"""Sums of gradients on a server: what is in them, what they take, and when they are gone."""

# N factors

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol import Backward
from shoal.server.refusals import Refused
from shoal.server.training.gradient_sums import MAX_SUMS, GradientSum, GradientSums
from shoal.server.training.saved_activations import ByteBudget

from .virtual_time import run

SECONDS = 10.0
NUM_FACTORS = 4
NUM_BYTES = 8 * NUM_FACTORS
FIRST, SECOND = "1" * 32, "2" * 32
NUMBERS = st.lists(
    st.floats(-1e4, 1e4, width=32, allow_subnormal=False).filter(lambda each: not each or abs(each) > 1e-2),
    min_size=1,
    max_size=40,
)


def into(name: str | None, *, start: int = 0, **changes: Any) -> Backward:
    return Backward(model="m", fingerprint="f", start=start, end=4, into=name, **changes)


def ones(value: float = 1.0) -> torch.Tensor:
    return torch.full((NUM_FACTORS,), value)


def one_sum() -> GradientSum:
    return GradientSum("these", (ByteBudget(1000),))


def play(act: Callable[[GradientSums, ByteBudget], Awaitable[None]], *, max_bytes: int = 10 * NUM_BYTES) -> None:
    """Keep sums within a budget, half of which one client may take. Nothing may be left of it."""

    async def scene() -> None:
        budget = ByteBudget(max_bytes)
        sums = GradientSums(budget, client_bytes=max_bytes // 2, seconds=SECONDS)
        await act(sums, budget)
        await asyncio.sleep(SECONDS + 1)
        assert not len(sums)
        assert not budget.used_bytes
        await sums.wait_until_taken()

    run(scene())


@given(numbers=NUMBERS, data=st.data())
def test_a_sum_does_not_depend_on_the_order_and_both_halves_are_the_sum_in_float64(
    numbers: list[float], data: st.DataObject
):
    one, other = one_sum(), one_sum()
    for number in numbers:
        assert one.add(ones(number), ())
    for number in data.draw(st.permutations(numbers)):
        assert other.add(ones(number), ())
    whole, high, rest = one.take(keeps_rest=False), other.take(keeps_rest=True), other.take(keeps_rest=True)
    assert whole is not None
    assert high is not None
    assert rest is not None
    assert torch.equal(whole.factors_N, high.factors_N)
    assert whole.factors_N.dtype == rest.factors_N.dtype == torch.float32
    assert whole.num_passes == high.num_passes == rest.num_passes == len(numbers)
    exact = sum(torch.tensor(number, dtype=torch.float64) for number in numbers)
    assert ((high.factors_N.double() + rest.factors_N.double() - exact).abs() <= exact.abs() * 2.0**-47).all()
    assert one.take(keeps_rest=False) is None
    assert other.take(keeps_rest=False) is None


def test_what_no_pass_has_used_has_no_gradient():
    one = one_sum()
    one.add(ones(), (0, 1))
    one.add(ones(), (1, 2))
    taken = one.take(keeps_rest=False)
    assert taken is not None
    assert taken.unused == (1,)


def test_what_is_infinite_stays_infinite():
    one = one_sum()
    one.add(torch.tensor([float("inf"), float("nan"), 3e38]), ())
    one.add(torch.tensor([1.0, 1.0, 3e38]), ())
    high, rest = one.take(keeps_rest=True), one.take(keeps_rest=False)
    assert high is not None
    assert rest is not None
    assert [str(each) for each in (high.factors_N + rest.factors_N).tolist()] == ["inf", "nan", "inf"]


def test_nothing_is_added_to_what_is_taken_or_dropped():
    one = one_sum()
    assert one.add(ones(), ())
    one.take(keeps_rest=True)
    assert not one.add(ones(), ())
    one.drop()
    one.drop()
    assert not one.add(ones(), ())
    assert one.budgets[0].used_bytes == 0


def test_a_sum_counts_in_the_budget_until_it_is_taken():
    async def act(sums: GradientSums, budget: ByteBudget) -> None:
        one = sums.of("a", into(FIRST))
        assert one is not None
        assert not budget.used_bytes
        assert one.add(ones(), ())
        assert one.add(ones(), ())
        assert budget.used_bytes == NUM_BYTES
        assert sums.of("a", into(FIRST)) is one
        assert await sums.take("b", FIRST, keeps_rest=False) is None
        assert await sums.take("a", SECOND, keeps_rest=False) is None
        taken = await sums.take("a", FIRST, keeps_rest=False)
        assert taken is not None
        assert taken.factors_N.tolist() == [2.0] * NUM_FACTORS
        assert not budget.used_bytes
        assert not len(sums)

    play(act)


def test_a_pass_that_names_no_sum_has_none():
    async def act(sums: GradientSums, budget: ByteBudget) -> None:
        assert sums.of("a", into(None)) is None
        assert not len(sums)

    play(act)


@pytest.mark.parametrize("changes", [{"start": 1}, {"adapters": ("a" * 32,) * 4}, {"frozen": (1,)}])
def test_passes_of_other_factors_do_not_belong_to_a_sum(changes: dict[str, Any]):
    async def act(sums: GradientSums, budget: ByteBudget) -> None:
        sums.of("a", into(FIRST))
        with pytest.raises(Refused, match="a sum of gradients of other factors"):
            sums.of("a", into(FIRST, **changes))
        assert sums.of("b", into(FIRST, **changes)) is not None

    play(act)


def test_one_client_has_half_of_the_room_and_a_limited_number_of_sums():
    async def act(sums: GradientSums, budget: ByteBudget) -> None:
        own = [sums.of("a", into(f"{number:032x}")) for number in range(MAX_SUMS + 1)]
        assert own[-1] is None
        added = [one is not None and one.add(ones(), ()) for one in own]
        assert added == [True] * 5 + [False] * (MAX_SUMS - 4)
        other = sums.of("b", into(FIRST))
        assert other is not None
        assert other.add(ones(), ())
        sums.release("a")
        assert budget.used_bytes == NUM_BYTES
        assert len(sums) == 1

    play(act)


def test_where_activations_take_all_there_is_no_room_for_a_sum():
    async def act(sums: GradientSums, budget: ByteBudget) -> None:
        one = sums.of("a", into(FIRST))
        assert one is not None
        assert budget.reserve(10 * NUM_BYTES - 1)
        assert not one.add(ones(), ())
        budget.release(10 * NUM_BYTES - 1)
        assert one.add(ones(), ())
        assert one.num_passes == 1

    play(act)


def test_a_sum_that_is_not_taken_is_dropped_a_while_after_the_last_pass():
    async def act(sums: GradientSums, budget: ByteBudget) -> None:
        one = sums.of("a", into(FIRST))
        assert one is not None
        one.add(ones(), ())
        await asyncio.sleep(SECONDS - 1)
        sums.of("a", into(FIRST))
        await asyncio.sleep(SECONDS - 1)
        assert len(sums) == 1
        await asyncio.sleep(2)
        assert not len(sums)
        assert not one.add(ones(), ())

    play(act)
