"""One server's engine and its clients, without a network: what they share, and what they must not notice."""

from __future__ import annotations

import asyncio
import threading
from random import Random

import pytest
import torch

from shoal.model.body import Body
from shoal.protocol import Open, Step
from shoal.server.engine.engine import Engine
from shoal.server.kv.session_cache import SessionCache
from shoal.server.refusals import Refused
from shoal.server.step_inputs import StepInputs
from shoal.spans import Span

from .tiny_models import NUM_BLOCKS
from .visitors import MOST_TOKENS, Visitor, engine_of, random_inputs, tiny_body

pytestmark = pytest.mark.anyio


@pytest.fixture
def body() -> Body:
    return tiny_body("llama")


async def decode(visitor: Visitor, body: Body, *, seed: int, num_tokens: int = 20) -> None:
    """More tokens of one sequence, one by one, other ones for another seed."""
    for token in random_inputs(seed, body, 1, num_tokens).split(1, dim=1):
        await visitor.step(token)


def check(*visitors: Visitor) -> None:
    for visitor in visitors:
        visitor.leave()
        visitor.check()


# -- beginnings that are shared -----------------------------------------------------------------------------------


async def test_who_begins_as_somebody_did_gets_those_outputs_and_goes_on(body: Body):
    prompt = random_inputs(1, body, 1, 40)
    async with engine_of(body, num_pages=20) as engine:
        first, second = Visitor(engine, body), Visitor(engine, body)
        expected = await first.step(prompt)
        outputs = await second.step(prompt)
        assert second.num_known == 32
        assert torch.equal(outputs[:, :32], expected[:, :32])
        assert engine.cache_tokens - engine.cache_tokens_left == 16 * (3 + 1)
        await asyncio.gather(decode(first, body, seed=2), decode(second, body, seed=3))
        check(first, second)


async def test_what_is_all_known_needs_no_step(body: Body):
    prompt = random_inputs(1, body, 1, 32)
    async with engine_of(body, num_pages=20) as engine:
        first, second = Visitor(engine, body), Visitor(engine, body)
        expected = await first.step(prompt)
        first.leave()
        assert torch.equal(await second.step(prompt), expected)
        await decode(second, body, seed=2)
        check(second)


async def test_eight_at_once_begin_alike_and_go_on_as_they_like(body: Body):
    prompt = random_inputs(1, body, 1, 40)
    async with engine_of(body, num_pages=2 + 8 * 2) as engine:
        first = Visitor(engine, body)
        await first.step(prompt)
        first.leave()
        visitors = [Visitor(engine, body) for _ in range(8)]
        await asyncio.gather(*(visitor.step(prompt) for visitor in visitors))
        assert [visitor.num_known for visitor in visitors] == [32] * 8
        await asyncio.gather(*(decode(visitor, body, seed=seed) for seed, visitor in enumerate(visitors)))
        assert engine.cache_tokens_left == 0
        check(first, *visitors)


async def test_sequences_of_a_batch_begin_with_what_all_of_them_have(body: Body):
    one, two = random_inputs(1, body, 1, 40), random_inputs(2, body, 1, 40)
    mixed = torch.cat((two[:, :16], one[:, 16:]), dim=1)
    async with engine_of(body, num_pages=20) as engine:
        first, batch = Visitor(engine, body), Visitor(engine, body)
        await first.step(torch.cat((one, two)))
        await batch.step(torch.cat((one, mixed)))
        assert batch.num_known == 16
        await batch.step(random_inputs(3, body, 3, 5), rows=[1, 0, 1], position=30)
        check(first, batch)


@pytest.mark.parametrize("differs", ["salt", "span", "first input", "position"])
async def test_nothing_is_shared_with_who_differs_in_anything(body: Body, differs: str):
    prompt = random_inputs(1, body, 1, 40)
    async with engine_of(body, num_pages=20) as engine:
        first = Visitor(engine, body)
        await first.step(prompt)
        span = Span(0, NUM_BLOCKS - 1) if differs == "span" else None
        other = Visitor(engine, body, span=span, salt="other" if differs == "salt" else "")
        prompt = prompt.clone()
        prompt[0, 0, 0] += differs == "first input"
        mask = None
        if differs == "position":
            mask = torch.ones(1, 40, dtype=torch.uint8)
            mask[0, 0] = 0
        await other.step(prompt, mask_BT=mask)
        assert other.num_known == 0
        check(first, other)


async def test_names_of_what_was_never_sent_are_worth_nothing(body: Body):
    """A liar says that his sequence begins as another one does. He cannot make others get what he computes."""
    secret, lie = random_inputs(1, body, 1, 40), random_inputs(2, body, 1, 40)
    async with engine_of(body, num_pages=20) as engine:
        liar, honest = Visitor(engine, body), Visitor(engine, body)
        honest.inputs_BSD = secret
        names = honest.names()
        honest.inputs_BSD = secret[:, :0]
        liar.names = lambda: names  # type: ignore[method-assign]
        await liar.step(lie)
        assert liar.num_known == 0
        await honest.step(secret)
        assert honest.num_known == 0
        check(liar, honest)


async def test_two_go_on_differently_in_the_middle_of_a_page_that_they_share(body: Body):
    prompt = random_inputs(1, body, 1, 32)
    async with engine_of(body, num_pages=20) as engine:
        first, second = Visitor(engine, body), Visitor(engine, body)
        await first.step(prompt)
        await second.step(prompt)
        assert second.num_known == 32
        await second.step(random_inputs(2, body, 1, 5), position=20)
        await decode(first, body, seed=3)
        await first.step(random_inputs(4, body, 1, 5), position=7)
        third = Visitor(engine, body)
        await third.step(prompt)
        assert third.num_known == 32
        check(first, second, third)


async def test_beams_share_a_page_until_they_differ(body: Body):
    async with engine_of(body, num_pages=20) as engine:
        visitor = Visitor(engine, body)
        await visitor.step(random_inputs(1, body, 1, 20))
        await visitor.step(random_inputs(2, body, 3, 1), rows=[0, 0, 0])
        assert engine.cache_tokens - engine.cache_tokens_left == 16 * (1 + 3)
        for seed in range(3, 9):
            await visitor.step(random_inputs(seed, body, 3, 1), rows=[2, 0, 2])
        check(visitor)


async def test_what_is_kept_for_those_who_may_come_is_given_to_those_who_are_here(body: Body):
    prompt = random_inputs(1, body, 1, 48)
    async with engine_of(body, num_pages=4) as engine:
        visitor = Visitor(engine, body)
        await visitor.step(prompt)
        visitor.leave()
        assert engine.cache_tokens_left == engine.cache_tokens
        other = Visitor(engine, body)
        await other.step(random_inputs(2, body, 1, 33))
        again = Visitor(engine, body)
        other.leave()
        await again.step(prompt)
        assert again.num_known == 16
        check(visitor, other, again)


# -- room -------------------------------------------------------------------------------------------------------------


async def test_the_youngest_gives_its_pages_up_and_is_told_at_its_next_step(body: Body):
    async with engine_of(body, num_pages=4) as engine:
        old, young = Visitor(engine, body), Visitor(engine, body, salt="young")
        await old.step(random_inputs(1, body, 1, 30))
        await young.step(random_inputs(2, body, 1, 30))
        await old.step(random_inputs(3, body, 1, 10))
        lost = young.session
        assert lost is not None
        with pytest.raises(Refused, match="others needed this session's pages"):
            await engine.step(lost, Step(position=30), StepInputs(random_inputs(4, body, 1, 1), None, None))
        old.leave()
        await young.step(random_inputs(4, body, 1, 1))
        assert (old.num_replays, young.num_replays) == (0, 1)
        check(old, young)


async def test_who_was_given_known_pages_and_then_falls_silent_gives_them_up(body: Body):
    prompt = random_inputs(1, body, 1, 32)
    async with engine_of(body, num_pages=4) as engine:
        first, silent, busy = Visitor(engine, body), Visitor(engine, body), Visitor(engine, body)
        await first.step(prompt)
        first.leave()
        await busy.step(random_inputs(2, body, 1, 20))
        await silent.step(prompt)
        assert engine.cache_tokens_left == 0
        await busy.step(random_inputs(3, body, 1, 20))
        assert busy.num_replays == 0
        await silent.step(random_inputs(4, body, 1, 1)) if busy.leave() else None
        check(first, silent, busy)


async def test_who_is_preempted_while_a_long_prompt_is_being_named_begins_again(
    body: Body, monkeypatch: pytest.MonkeyPatch
):
    named, go_on = threading.Event(), threading.Event()

    def append_inputs(session: SessionCache, inputs: StepInputs) -> None:
        if session.span != body.span:
            named.set()
            go_on.wait()
        usual(session, inputs)

    usual = SessionCache.append_inputs
    monkeypatch.setattr(SessionCache, "append_inputs", append_inputs)
    monkeypatch.setattr("shoal.server.engine.engine.HASH_ASIDE_TOKENS", 2)
    async with engine_of(body, num_pages=12) as engine:
        old, young = Visitor(engine, body), Visitor(engine, body, span=Span(0, 1))
        await old.step(random_inputs(1, body, 3, 40))
        go_on.set()
        await young.step(random_inputs(2, body, 1, 1))
        named.clear()
        go_on.clear()
        prompt = asyncio.create_task(young.step(random_inputs(3, body, 2, MOST_TOKENS - 2), rows=[0, 0]))
        await asyncio.to_thread(named.wait)
        await old.step(random_inputs(4, body, 3, 20))
        go_on.set()
        old.leave()
        await prompt
        assert young.num_replays == 1
        check(old, young)


@pytest.mark.parametrize("family", ["gptj", "jamba"])
async def test_who_is_preempted_while_a_cache_of_transformers_is_rewound_begins_again(family: str):
    body = tiny_body(family)
    async with engine_of(body, num_pages=6) as engine:
        rewound, growing = Visitor(engine, body), Visitor(engine, body, peer="other")
        await rewound.step(random_inputs(1, body, 1, 56))
        await growing.step(random_inputs(2, body, 1, 30))
        again = asyncio.create_task(rewound.step(random_inputs(3, body, 1, 1), position=55))
        await growing.step(random_inputs(4, body, 1, 10))
        growing.leave()
        await again
        assert (growing.num_replays, rewound.num_replays) == (0, 1)
        check(rewound, growing)


# -- what others send -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral", "mixtral", "deepseek_v3", "bloom"])
async def test_numbers_that_are_none_stay_with_who_sent_them_and_leave_with_him(family: str, number: float):
    body = tiny_body(family)
    chance = Random(family)
    async with engine_of(body, num_pages=10) as engine:
        bad, good = Visitor(engine, body), [Visitor(engine, body) for _ in range(3)]
        others = [visitor.step(random_inputs(seed, body, 1, 20)) for seed, visitor in enumerate(good)]
        await asyncio.gather(bad.step(torch.full_like(random_inputs(0, body, 1, 30), number)), *others)
        for seed in range(4, 10):
            steps = [visitor.step(random_inputs(seed, body, 1, chance.choice([1, 2]))) for visitor in good]
            await asyncio.gather(bad.step(torch.full_like(random_inputs(0, body, 1, 1), number)), *steps)
        bad.leave()
        heir = Visitor(engine, body)
        await asyncio.gather(
            heir.step(random_inputs(20, body, 1, 40)), *(each.step(random_inputs(21, body, 1, 1)) for each in good)
        )
        await decode(heir, body, seed=22, num_tokens=10)
        check(heir, *good)


class Fails(torch.nn.Module):
    """A block that cannot compute certain inputs."""

    def forward(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if (args[0] == 13.0).any():
            raise ArithmeticError("thirteen")


@pytest.mark.parametrize("family", ["llama", "bloom", "mamba2"])
async def test_a_step_that_fails_fails_alone(family: str):
    body = tiny_body(family)
    hook = body.block(0).register_forward_pre_hook(Fails())
    try:
        async with engine_of(body, num_pages=20) as engine:
            unlucky, good = Visitor(engine, body), [Visitor(engine, body) for _ in range(3)]
            for seed in range(6):
                steps = [
                    visitor.step(random_inputs(seed + 10 * index, body, 1, 7)) for index, visitor in enumerate(good)
                ]
                bad = random_inputs(seed, body, 1, 7)
                if seed == 3:
                    bad = torch.full_like(bad, 13.0)
                results = await asyncio.gather(*steps[:2], unlucky.step(bad), steps[2], return_exceptions=True)
                if seed < 3:
                    assert not any(isinstance(result, Exception) for result in results)
                if seed == 3:
                    assert [type(result) for result in results if isinstance(result, Exception)] == [ArithmeticError]
                    unlucky.leave()
                    unlucky = Visitor(engine, body)
            check(unlucky, *good)
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["mamba2", "jamba", "qwen3_next"])
async def test_padding_before_recurrent_blocks_is_not_cut_off(family: str):
    body = tiny_body(family)
    async with engine_of(body, num_pages=200) as engine:
        decoder, crowd = Visitor(engine, body), Visitor(engine, body)
        await decoder.step(random_inputs(1, body, 1, 3))
        mask = torch.ones(40, 12, dtype=torch.uint8)
        mask[::2, :5] = 0
        await asyncio.gather(
            decode(decoder, body, seed=2, num_tokens=6), crowd.step(random_inputs(3, body, 40, 12), mask_BT=mask)
        )
        check(decoder, crowd)


def open_and_close(engine: Engine, **changes: object) -> None:
    fields = {"model": "", "fingerprint": "", "start": 0, "end": NUM_BLOCKS, "batch_size": 1, "expected_length": 8}
    session, _ = engine.open("client", Open(**{**fields, **changes}), {})
    engine.close(session)
    engine.close(session)


async def test_a_session_may_be_closed_twice_and_before_it_began(body: Body):
    async with engine_of(body, num_pages=4) as engine:
        open_and_close(engine)
        engine.check_integrity()
        with pytest.raises(Refused, match="65 tokens"):
            open_and_close(engine, expected_length=65)
        with pytest.raises(Refused, match="can never fit"):
            open_and_close(engine, expected_length=40, batch_size=2)


# -- a server that forgets ----------------------------------------------------------------------------------------


async def test_an_engine_that_forgets_in_the_middle_of_everything_is_as_good_as_new(body: Body):
    prompt = random_inputs(1, body, 1, 40)
    async with engine_of(body, num_pages=40) as engine:
        visitors = [Visitor(engine, body) for _ in range(3)]
        await asyncio.gather(*(visitor.step(prompt) for visitor in visitors))
        working = [
            asyncio.create_task(decode(visitor, body, seed=seed, num_tokens=20))
            for seed, visitor in enumerate(visitors)
        ]
        for num_tokens in (45, 50, 55):
            while min(visitor.num_tokens for visitor in visitors) < num_tokens:
                assert not any(task.done() and task.exception() for task in working)
                await asyncio.sleep(0)
            engine.forget()
            assert engine.cache_tokens_left == engine.cache_tokens
            engine.check_integrity()
        await asyncio.gather(*working)
        assert min(visitor.num_replays for visitor in visitors) > 0
        check(*visitors)


async def test_what_was_known_before_it_was_forgotten_is_computed_again(body: Body):
    prompt = random_inputs(1, body, 1, 40)
    async with engine_of(body, num_pages=20) as engine:
        first, second = Visitor(engine, body), Visitor(engine, body)
        await first.step(prompt)
        first.leave()
        engine.forget()
        await second.step(prompt)
        assert second.num_known == 0
        check(first, second)
