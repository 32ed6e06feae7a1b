"""What a server holds of clients' adapters, removed ones included: never more than its budget."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.adapters import Prompt
from shoal.model.body import Body
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.model.peft.factors import factors_name
from shoal.protocol import Adapter, Forward
from shoal.server.refusals import Refused
from shoal.server.training.adapter_store import LAYER_BYTES, POPULAR, AdapterStore
from shoal.spans import Span

from .tiny_models import NUM_BLOCKS
from .virtual_time import run
from .visitors import tiny_body

MAX_ADAPTERS = 5
LAYER = Prompt(num_tokens=1)
ON_SPAN: dict[str, Any] = {"model": "", "fingerprint": "", "start": 0, "end": NUM_BLOCKS}


@pytest.fixture(scope="module")
def body() -> Body:
    return tiny_body("llama")


class Clients:
    """Clients that send adapters of one prompt each, told apart by numbers, and compute with them."""

    def __init__(self, body: Body) -> None:
        self._hidden_size = body.backbone.config.hidden_size
        self.size = LAYER_BYTES + self._values(0).nbytes
        self.saved: list[BlockAdapter] = []  # the adapters of saved passes
        self.adapters = AdapterStore(body, max_bytes=MAX_ADAPTERS * self.size, drop_adapters=self._drop)

    def _values(self, number: int) -> torch.Tensor:
        return torch.full((self._hidden_size,), float(number))

    def _drop(self, removed: Collection[BlockAdapter]) -> None:
        self.saved = [each for each in self.saved if each not in removed]

    def name(self, number: int) -> str:
        return factors_name(0, (LAYER,), self._values(number))

    async def send(self, peer: str, number: int, **fields: Any) -> None:
        lesson = Adapter(block=0, layers=(LAYER,), **fields)
        await self.adapters.store(peer, lesson, {"factors": self._values(number)})

    def use(self, peer: str, number: int) -> BlockAdapter:
        request = Forward(**ON_SPAN, adapters=(self.name(number), *[None] * (NUM_BLOCKS - 1)))
        return self.adapters.of(peer, request, Span(0, NUM_BLOCKS))[0]

    def check(self) -> None:
        """The sums are those of the adapters that are there."""
        assert self.adapters.num_bytes == len(self.adapters.names) * self.size <= MAX_ADAPTERS * self.size
        self.adapters.check_integrity()


numbers = st.integers(0, 9)
peers = st.sampled_from("abc")
acts = st.one_of(
    st.tuples(st.just("send"), peers, numbers, st.sampled_from([None, "0123456789abcdef"])),
    st.tuples(st.just("replace"), peers, numbers, numbers),
    st.tuples(st.just("use"), peers, numbers, st.none()),
    st.tuples(st.just("leave"), peers, st.none(), st.none()),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(story=st.lists(acts, max_size=30))
def test_every_adapter_is_counted_in_any_order_of_acts(body: Body, story: list[Any]):
    async def scene() -> None:
        clients = Clients(body)
        for act, peer, number, other in story:
            match act:
                case "send":
                    await clients.send(peer, number, shared=other)
                case "replace":
                    await clients.send(peer, number, replaces=clients.name(other))
                case "use" if clients.name(number) in clients.adapters.names:
                    clients.use(peer, number)
                case "leave":
                    clients.adapters.release(peer)
            clients.check()
        for peer in (*"abc", POPULAR):
            clients.adapters.release(peer)
        clients.check()
        assert not clients.adapters.num_bytes

    run(scene())


def test_the_client_that_holds_most_loses_its_least_recently_used_adapter(body: Body):
    async def scene() -> None:
        clients = Clients(body)
        await clients.send("modest", 0)
        for number in (1, 2, 3, 4):
            await clients.send("greedy", number)
        clients.use("greedy", 1)
        await clients.send("modest", 5)
        gone = [number for number in range(6) if clients.name(number) not in clients.adapters.names]
        assert gone == [2]

    run(scene())


def test_replaced_adapters_that_sessions_still_use_are_limited(body: Body):
    async def scene() -> None:
        clients, sessions = Clients(body), list[BlockAdapter]()
        await clients.send("greedy", 0)
        for number in range(1, 2 * MAX_ADAPTERS):
            sessions.append(clients.use("greedy", number - 1))
            await clients.send("greedy", number, replaces=clients.name(number - 1))
        sessions.append(clients.use("greedy", number))
        with pytest.raises(Refused, match="still use adapters that were replaced") as refusal:
            await clients.send("greedy", 100, replaces=clients.name(number))
        assert refusal.value.failure.code == "busy"
        sessions.pop()
        await clients.send("greedy", 100)

    run(scene())


def test_saved_passes_are_dropped_before_a_client_is_refused_as_busy(body: Body):
    async def scene() -> None:
        clients = Clients(body)
        await clients.send("trainer", 0)
        for number in range(1, 5 * MAX_ADAPTERS):
            clients.saved.append(clients.use("trainer", number - 1))
            await clients.send("trainer", number, replaces=clients.name(number - 1))
            assert len(clients.saved) <= 2 * MAX_ADAPTERS

    run(scene())
