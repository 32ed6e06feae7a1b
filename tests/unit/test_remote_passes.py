"""Passes of training over one server that answers at once, with tensors too large to be sent."""

# B sequences, T tokens, D hidden size, N factors

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Set
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.adapters import Prompt
from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.adapter_sync import AdapterSync
from shoal.client.swarm.broken_pairs import BrokenPairs, PushRules
from shoal.client.swarm.message_sizes import check_size
from shoal.client.training.gradients import spans_of_one_answer
from shoal.client.training.pass_plan import PassPlan
from shoal.client.training.remote_passes import RemotePasses
from shoal.errors import UserError
from shoal.model.peft.factors import ActiveAdapters, AdapterFactors
from shoal.policy.routing.route import Hop
from shoal.policy.view import SwarmView
from shoal.protocol import MAX_PASS_TOKENS, MAX_PAYLOAD_BYTES, Adapter, AdapterStored, AnyMessage, Forward, PassResult
from shoal.spans import Span
from shoal.tensors import MAX_DIMENSION

from . import virtual_time
from .test_connection import SERVER

MIB = 2**20
WHOLE = Span(0, 4)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Any number of them, which take no memory."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def tuning(num_factors: int, *, blocks: Span = WHOLE, dtype: torch.dtype = torch.float32) -> ActiveAdapters:
    """`num_factors` factors in each block."""
    values = zeros(num_factors, dtype=dtype)
    return ActiveAdapters(
        {block: AdapterFactors(f"{block:032x}", block, (Prompt(num_tokens=1),), values) for block in blocks}
    )


class OneServer:
    """A swarm of one server, and the connection to it: its outputs are its inputs, and all gradients are zero."""

    model = SimpleNamespace(key="model")
    fingerprint = "f" * 64
    config = ClientOptions()
    push_rules = PushRules(BrokenPairs(lambda: 0.0), "raw")
    audits = SimpleNamespace(is_on=False)
    encoding = "raw"
    error = None
    tab = None
    awaiting_since = None

    def __init__(self) -> None:
        self.servers = self.measurements = self
        self.adapter_sync = AdapterSync()
        self.asked: list[tuple[str, Span]] = []
        self.num_factors: dict[int, int] = {}

    async def route_of_others(self, span: Span, peers: Set[str], excluded: Set[Any], **_: Any) -> Any:
        return SimpleNamespace(hops=(Hop(SERVER, span),))

    async def with_failover(self, span: Span, act: Callable[[Set[Any]], Awaitable[Any]], **_: Any) -> Any:
        return await act(frozenset())

    async def num_servers(self, span: Span) -> int:
        return 1

    def reserving(self, route: Any) -> Any:
        return contextlib.nullcontext()

    def record_answer(self, hop: Hop) -> None:
        pass

    def record_computed(self, peer: str) -> None:
        pass

    def is_avoided(self, peer: str) -> bool:
        return False

    def is_confirmed(self, peer: str) -> bool:
        return True

    def slowness(self, peer: str) -> float:
        return 1.0

    def round_trips(self) -> dict[str, float]:
        return {}

    def others(self, server: Any) -> SwarmView:
        return SwarmView(len(WHOLE))

    async def connect(self, _: object) -> Any:
        return self

    async def close(self) -> None:
        pass

    async def ask_all(self, questions: list[tuple[Adapter, Any]], **_: Any) -> list[Any]:
        self.num_factors.update({message.block: len(tensors["factors"]) for message, tensors in questions})
        return [(AdapterStored(), {})] * len(questions)

    async def ask(self, request: Any, tensors: Any, **_: Any) -> tuple[AnyMessage, Any]:
        span = Span(request.start, request.end)
        self.asked.append((request.kind, span))
        if isinstance(request, Forward):
            return PassResult(), {"hidden": tensors["hidden"]}
        found = {"factor_grads": zeros(sum(self.num_factors.get(block, 0) for block in span))}
        return PassResult(), found | ({"grad": tensors["grad"]} if request.inputs else {})


def trained(plan: PassPlan, hidden_BTD: torch.Tensor) -> OneServer:
    """The server after a step."""

    async def step() -> OneServer:
        server = OneServer()
        async with RemotePasses(server) as passes:  # type: ignore[arg-type]
            output_BTD, pieces = await passes.forward(plan, hidden_BTD, None, None)
            await passes.backward(plan, pieces, torch.zeros_like(output_BTD))
        return server

    return virtual_time.run(step())


@pytest.mark.parametrize(
    ("factors", "hidden_bytes", "parts"),
    [
        (tuning(10 * MIB), 0, ["0:4"]),  # 40 MiB for each block
        (tuning(20 * MIB), 0, ["0:3", "3:4"]),
        (tuning(20 * MIB), 100 * MIB, ["0:1", "1:2", "2:3", "3:4"]),
        (tuning(40 * MIB), 0, ["0:1", "1:2", "2:3", "3:4"]),
        (tuning(40 * MIB, blocks=Span(1, 3)), 0, ["0:2", "2:4"]),
        (tuning(20 * MIB, dtype=torch.bfloat16), 0, ["0:3", "3:4"]),  # MAX_DIMENSION numbers take 128 MiB
        (ActiveAdapters(), MAX_PAYLOAD_BYTES, ["0:4"]),
    ],
)
def test_a_span_is_cut_where_its_gradients_are_too_large_for_one_answer(
    factors: ActiveAdapters, hidden_bytes: int, parts: list[str]
):
    assert [str(part) for part in spans_of_one_answer(WHOLE, factors, hidden_bytes=hidden_bytes)] == parts


@pytest.mark.parametrize(
    ("num_factors", "dtype", "hidden_bytes"),
    [(60 * MIB, torch.float32, 20 * MIB), (MAX_DIMENSION + 1, torch.bfloat16, 0)],
)
def test_a_block_whose_gradients_never_fit_is_an_error_that_says_so(
    num_factors: int, dtype: torch.dtype, hidden_bytes: int
):
    with pytest.raises(UserError, match="gradients of block 2's factors and of its inputs do not fit into a message"):
        spans_of_one_answer(WHOLE, tuning(num_factors, blocks=Span(2, 4), dtype=dtype), hidden_bytes=hidden_bytes)


def test_a_pass_is_saved_for_the_same_blocks_as_its_gradients_are_asked_for():
    server = trained(PassPlan(WHOLE, tuning(20 * MIB), wanted_from=0), zeros(1, 3, 8))
    assert server.asked == [
        ("forward", Span(0, 3)),
        ("forward", Span(3, 4)),
        ("backward", Span(3, 4)),
        ("backward", Span(0, 3)),
    ]


def test_blocks_of_which_no_gradient_is_wanted_are_asked_together():
    server = trained(PassPlan(WHOLE, tuning(40 * MIB), wanted_from=None), zeros(1, 3, 8))
    assert server.asked == [("forward", WHOLE)]


@pytest.mark.parametrize(("wanted_from", "mib", "refused"), [(None, 150, False), (0, 120, False), (0, 150, True)])
def test_a_sequence_whose_gradient_would_not_fit_beside_it_is_refused_before_it_is_computed(
    wanted_from: int | None, mib: int, refused: bool
):
    hidden_BTD, server = zeros(1, 8192, mib << 5), OneServer()
    passes = RemotePasses(server)  # type: ignore[arg-type]
    forward = passes.forward(PassPlan(WHOLE, ActiveAdapters(), wanted_from=wanted_from), hidden_BTD, None, None)
    if refused:
        with pytest.raises(UserError, match="8192 tokens of one sequence and a gradient for each of them do not fit"):
            virtual_time.run(forward)
    else:
        virtual_time.run(forward)
    assert bool(server.asked) != refused


def test_a_sequence_that_is_too_long_for_a_pass_is_refused_before_any_server_is_asked():
    server = OneServer()
    passes = RemotePasses(server)  # type: ignore[arg-type]
    virtual_time.run(passes.forward(PassPlan(WHOLE, ActiveAdapters()), zeros(1, MAX_PASS_TOKENS, 4), None, None))
    assert len(server.asked) == 1
    with pytest.raises(UserError, match="16385 tokens of one sequence; a pass without a cache has 16384 at most"):
        virtual_time.run(
            passes.forward(PassPlan(WHOLE, ActiveAdapters()), zeros(1, MAX_PASS_TOKENS + 1, 4), None, None)
        )
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"hidden": zeros(1, 300 << 10, 256)}, "307200 tokens of one sequence do not fit into a message of 256 MiB"),
        ({"grad": zeros(1, 300 << 10, 256)}, "307200 tokens of one sequence and a gradient"),
        ({"factors": zeros(65 * MIB)}, "68157440 factors of one block do not fit"),
        ({"factors": zeros(65 * MIB, dtype=torch.bfloat16)}, "68157440 factors of one block do not fit"),
    ],
)
def test_the_error_names_what_is_too_large_for_a_message(tensors: Any, reason: str):
    check_size({"positions": zeros(1, 4), "factors": zeros(MIB)})
    with pytest.raises(UserError, match=reason):
        check_size(tensors)
