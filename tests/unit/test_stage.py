"""What a stage believes of what its server says, and how servers become neighbors in a ring."""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.client.decoding.opening.stage_opener import StageOpener
from shoal.client.decoding.outputs import Outputs
from shoal.client.decoding.pending_step import PendingStep
from shoal.client.decoding.progress import StageStatus
from shoal.client.decoding.push_links import PushLinks
from shoal.client.decoding.receipts.stage_receipts import MAX_WAITING
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import IDLE_PONGS, Stage
from shoal.client.history.history import History
from shoal.client.history.history_store import HistoryStore
from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.broken_pairs import RETRY_PUSH_SECONDS, UNPUSHED_PONGS, BrokenPairs, PushRules
from shoal.client.swarm.connection import Connection
from shoal.errors import PeerError, ServerLost
from shoal.model.peft.factors import ActiveAdapters
from shoal.peers import ServerInfo, ServerState
from shoal.policy.routing.route import Hop
from shoal.protocol import AnyMessage, Close, Leaving, Open, Opened, Ping, Pong, Receipt, StepResult, Unreached
from shoal.spans import Span
from shoal.tensors import TensorName

from . import virtual_time

SIZE = 4


def server(peer: str) -> ServerInfo:
    return ServerInfo(
        peer=peer,
        span=Span(0, 2),
        state=ServerState.ONLINE,
        fingerprint="f" * 64,
        decode_speed=100.0,
        prefill_speed=100.0,
        cache_tokens_left=4096,
        dtype="float32",
        quantization="none",
        version="1",
        name="",
        addresses=(f"/memory/{peer}",),
    )


class FakeConnection(Connection):
    """Keeps the error, and what is sent."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.encoding = "raw"
        self.error: PeerError | None = None
        self.on_end = lambda: None
        self.on_message = lambda message, tensors: None
        self.sent: list[AnyMessage] = []

    async def send(self, message: AnyMessage, tensors: Any = None) -> None:
        self.sent.append(message)

    def expect(self, *, usual_seconds: float | None, bytes_in_flight: int) -> None:
        pass

    def fail(self, error: PeerError) -> None:
        self.error = self.error or error
        self.on_end()


OPEN = Open(
    model="m",
    fingerprint="f" * 64,
    start=0,
    end=2,
    adapters=(),
    batch_size=1,
    expected_length=128,
    upstream=None,
    downstream=None,
)


class Scene:
    """A stage whose server is asked for steps of some tokens, and says what the test lets it say."""

    def __init__(self, peer: str = "b", *, num_known: int = 100) -> None:
        self.stage = Stage(Hop(server(peer), Span(0, 2)), History(HistoryStore()), lambda: None)
        self.stage.history.append(torch.ones(1, num_known, SIZE))
        self.connection = FakeConnection(peer)
        self.stage.adopt(self.connection)
        asyncio.run(self.stage.open(OPEN, None))
        self.outputs = Outputs(0)
        self.says(Opened())
        assert self.stage.settle_opening(self.outputs, like=torch.ones(1, 1, SIZE), wire="raw")

    def expect(self, *lengths: int, epoch: int = 0, pushed: bool = False, skip: int = 0) -> None:
        for length in lengths:
            shape = torch.Size((1, length, SIZE))
            position = self.stage.progress.num_requested
            step = PendingStep(epoch, position, shape, torch.float32, None, 0, 0.1, skip=skip, pushed=pushed)
            self.stage.expect(step)

    def says(self, message: AnyMessage, **tensors: torch.Tensor) -> None:
        named: dict[TensorName, torch.Tensor] = dict(tensors)  # type: ignore[arg-type]
        self.connection.on_message(message, named)

    def answers(self, position: int, num_tokens: int, *, epoch: int = 0, number: float = 1.0) -> None:
        self.says(StepResult(epoch=epoch, position=position), hidden=torch.full((1, num_tokens, SIZE), number))

    def settle(self) -> bool:
        return self.stage.settle(self.outputs, self.outputs, wire="raw", mask=lambda start, end: None)

    @property
    def error(self) -> PeerError | None:
        return self.stage.error


@settings(deadline=None)
@given(st.data())
def test_answers_are_taken_once_and_in_order_among_others(data: st.DataObject):
    """Each result comes, in order; between them come results twice, of the past, of other epochs and positions."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    steps = Scene()
    steps.expect(*lengths, epoch=2)
    others = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=6)
    wanted = {(2, sum(lengths[:n])) for n in range(len(lengths))}
    for n, length in enumerate(lengths):
        for epoch, position in data.draw(others):
            if (epoch, position) not in wanted:
                steps.answers(position, 1, epoch=epoch, number=-1.0)
        for _ in range(data.draw(st.integers(1, 3))):
            steps.answers(sum(lengths[:n]), length, epoch=2, number=float(n))
        if data.draw(st.booleans()):
            steps.settle()
        assert steps.stage.num_unsettled <= len(lengths)
    steps.settle()
    assert steps.error is None
    expected = torch.cat([torch.full((1, length, SIZE), float(n)) for n, length in enumerate(lengths)], dim=1)
    assert torch.equal(steps.outputs.joined(), expected)
    assert steps.stage.progress.num_computed == sum(lengths)
    assert not steps.stage.progress.pending


def test_results_that_were_not_asked_for_are_not_kept():
    steps = Scene()
    for n in range(1000):
        steps.answers(n, 1)
    assert not steps.stage.num_unsettled
    assert not steps.settle()


WRONG = {
    "no tensor": {},
    "another tensor": {"grad": torch.ones(1, 3, SIZE)},
    "fewer tokens": {"hidden": torch.ones(1, 2, SIZE)},
    "a larger batch": {"hidden": torch.ones(2, 3, SIZE)},
    "another hidden size": {"hidden": torch.ones(1, 3, SIZE + 1)},
    "another dtype": {"hidden": torch.ones(1, 3, SIZE).half()},
    "NaN": {"hidden": torch.full((1, 3, SIZE), float("nan"))},
    "infinity": {"hidden": torch.full((1, 3, SIZE), float("inf"))},
}


@pytest.mark.parametrize("tensors", WRONG.values(), ids=WRONG.keys())
def test_a_server_that_answers_wrongly_what_the_client_sent_is_lost(tensors: dict[str, torch.Tensor]):
    steps = Scene()
    steps.expect(3)
    steps.says(StepResult(), **tensors)
    assert not steps.settle()
    assert isinstance(steps.error, ServerLost)
    assert steps.outputs.num_tokens == 0


@pytest.mark.parametrize("tensors", WRONG.values(), ids=WRONG.keys())
def test_a_server_that_answers_wrongly_what_another_pushed_is_not_blamed_at_first(tensors: dict[str, torch.Tensor]):
    steps = Scene()
    steps.expect(3, pushed=True)
    steps.says(StepResult(), **tensors)
    assert not steps.settle()
    assert steps.error is None
    assert steps.stage.status is StageStatus.MISLED
    assert steps.outputs.num_tokens == 0


def test_numbers_that_are_not_finite_are_judged_when_their_inputs_are_known():
    steps = Scene(num_known=2)
    steps.expect(3)
    steps.answers(0, 3, number=float("nan"))
    assert not steps.settle()
    assert steps.error is None
    steps.stage.append(torch.full((1, 1, SIZE), float("nan")), 2)
    assert steps.settle()
    assert steps.stage.progress.num_computed == 3


def test_a_skipped_answer_has_no_tensor():
    steps = Scene()
    steps.expect(3, 3, skip=3)
    steps.says(StepResult())
    assert steps.settle()
    steps.answers(3, 3)
    steps.settle()
    assert isinstance(steps.error, ServerLost)


def test_a_server_that_says_twice_that_it_does_not_have_a_step_is_lost():
    steps = Scene()
    steps.expect(3)
    steps.says(Pong())
    assert steps.error is None
    steps.says(Pong())
    assert isinstance(steps.error, ServerLost)


@pytest.mark.parametrize(
    "pongs",
    [
        [Pong(), Pong(working=True)] * 5,
        [Pong(working=True, position=0)] * 9,
        [Pong(working=True, epoch=7, position=9)] * 9,
    ],
    ids=["now and then", "working", "working on something"],
)
def test_a_server_that_works_in_between_has_the_step(pongs: list[Pong]):
    steps = Scene()
    steps.expect(3)
    for pong in pongs:
        steps.says(pong)
    assert steps.error is None


def test_a_server_that_says_it_has_done_what_it_never_answered_is_lost():
    steps = Scene()
    steps.expect(3)
    for _ in range(IDLE_PONGS):
        steps.says(Pong(position=3))
    assert isinstance(steps.error, ServerLost)


def test_an_answer_that_waits_for_its_inputs_is_an_answer():
    """The server before has not told the client these inputs yet."""
    steps = Scene(num_known=1)
    steps.expect(3)
    steps.answers(0, 3, number=float("nan"))
    for _ in range(9):
        steps.says(Pong(position=3))
    assert steps.error is None


@pytest.mark.parametrize("message", [Ping(), Close(), Opened()])
def test_a_server_that_says_what_only_clients_say_or_opens_twice_is_lost(message: AnyMessage):
    steps = Scene()
    assert steps.error is None
    steps.says(message)
    assert isinstance(steps.error, ServerLost)


def test_a_server_that_leaves_says_so():
    steps = Scene()
    steps.says(Leaving(seconds=3.0))
    assert steps.stage.is_leaving
    assert steps.error is None


# -- rings ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def time() -> Iterator[list[float]]:
    return [0.0]


def ring_of(time: list[float], *peers: str) -> tuple[PushLinks, list[Scene]]:
    ring = PushLinks(PushRules(BrokenPairs(lambda: time[0]), wire="raw"))
    all_steps = [Scene(peer) for peer in peers]
    ring.link([each.stage for each in all_steps])
    return ring, all_steps


def test_every_server_is_told_of_its_neighbors_and_of_one_link_for_each_pair(time):
    ring, steps = ring_of(time, "a", "b", "c")
    places = [ring.neighbors_of(each.stage) for each in steps]
    assert [before and before.peer for before, _ in places] == [None, "a", "b"]
    assert [after and after.peer for _, after in places] == ["b", "c", None]
    links = [(places[n][1].link, places[n + 1][0].link) for n in range(2)]
    assert all(one == other for one, other in links)
    assert len({one for one, _ in links}) == 2
    assert places[0][1].addresses == ("/memory/b",)


def test_pairs_that_stay_keep_their_link_and_new_ones_get_another(time):
    ring, (a, b, c) = ring_of(time, "a", "b", "c")
    kept, lost = ring.neighbors_of(a.stage)[1], ring.neighbors_of(b.stage)[1]
    other = Scene("d")
    ring.link([a.stage, b.stage, other.stage])
    assert ring.neighbors_of(a.stage)[1] == kept
    assert ring.neighbors_of(b.stage)[1].peer == "d"
    assert ring.neighbors_of(b.stage)[1].link != lost.link
    assert ring.neighbors_of(c.stage) == (None, None)
    assert not ring.pushes(b.stage, c.stage)


def test_a_server_does_not_push_to_itself(time):
    ring, (one, other) = ring_of(time, "a", "a")
    assert not ring.pushes(one.stage, other.stage)
    assert ring.neighbors_of(one.stage) == ring.neighbors_of(other.stage) == (None, None)


def broken(ring: PushLinks, one: Scene, other: Scene) -> int | None:
    one.settle()
    other.settle()
    return ring.break_failed(one.stage, other.stage)


def test_a_push_that_failed_breaks_the_pair_at_its_step_for_a_while(time):
    ring, (a, b) = ring_of(time, "a", "b")
    a.expect(2, 2)
    b.expect(2, 2, pushed=True)
    assert broken(ring, a, b) is None
    a.says(Unreached(epoch=0, position=2))
    assert broken(ring, a, b) == 2
    assert not ring.pushes(a.stage, b.stage)
    assert ring.neighbors_of(a.stage) == ring.neighbors_of(b.stage) == (None, None)
    ring.link([a.stage, b.stage])
    assert not ring.pushes(a.stage, b.stage)
    time[0] += RETRY_PUSH_SECONDS + 1
    ring.link([a.stage, b.stage])
    assert ring.pushes(a.stage, b.stage)


@pytest.mark.parametrize(("epoch", "position"), [(1, 0), (0, 1), (0, 4)])
def test_a_failed_push_of_an_unknown_step_breaks_nothing(time, epoch: int, position: int):
    ring, (a, b) = ring_of(time, "a", "b")
    b.expect(2, 2, pushed=True)
    a.says(Unreached(epoch=epoch, position=position))
    assert broken(ring, a, b) is None
    assert ring.pushes(a.stage, b.stage)


def test_a_failed_push_of_a_step_that_the_client_sent_breaks_nothing(time):
    ring, (a, b) = ring_of(time, "a", "b")
    b.expect(2)
    a.says(Unreached(epoch=0, position=0))
    assert broken(ring, a, b) is None


def test_a_step_that_one_has_computed_and_the_next_lacks_was_not_pushed(time):
    ring, (a, b) = ring_of(time, "a", "b")
    a.expect(2)
    b.expect(2, pushed=True)
    for _ in range(UNPUSHED_PONGS):
        b.says(Pong())
    assert broken(ring, a, b) is None  # it is still on its way
    a.answers(0, 2)
    for _ in range(UNPUSHED_PONGS):
        assert broken(ring, a, b) is None
        b.says(Pong())
    assert broken(ring, a, b) == 0
    assert b.error is None


def test_a_server_that_was_misled_is_asked_by_the_client(time):
    ring, (a, b) = ring_of(time, "a", "b")
    b.expect(2, 2, pushed=True)
    b.answers(0, 1)
    assert broken(ring, a, b) == 0
    b.stage.unrequest_from(0)
    assert b.stage.status is StageStatus.OPEN
    b.expect(2, epoch=1)
    b.answers(0, 2)  # what was on its way
    b.answers(0, 1, epoch=1)
    b.settle()
    assert isinstance(b.error, ServerLost)


RECEIPT = Receipt(epoch=0, first=0, end=16, inputs="0" * 64, signature="0" * 128)


def test_a_receipt_that_was_not_asked_for_is_refused():
    steps = Scene()
    steps.says(RECEIPT)
    assert steps.error is not None
    assert "not asked for" in str(steps.error)


def test_receipts_that_were_asked_for_are_kept_until_the_session_looks_at_them_and_only_a_few():
    steps = Scene()
    asyncio.run(steps.stage.open(OPEN.model_copy(update={"receipts": "0" * 32}), None))
    for _ in range(1000):
        steps.says(RECEIPT)
    assert steps.error is None
    assert 0 < steps.stage.receipts.num_waiting <= MAX_WAITING


class ClosedConnection(FakeConnection):
    async def close(self, *, goodbye: bool = True) -> None:
        self.on_end = lambda: None


def test_who_waits_until_a_session_is_open_goes_on_when_somebody_else_gives_it_up():
    """As a step does that finds another server busy, while the standby of a server is opened."""

    async def act() -> float:
        stage = Stage(Hop(server("s"), Span(0, 2)), History(HistoryStore()), lambda: None)
        stage.adopt(ClosedConnection("s"))
        await stage.open(OPEN, None)
        inputs = SessionInputs(HistoryStore(), salt="")
        inputs.append(torch.zeros(1, 1, SIZE), None, None)
        swarm: Any = SimpleNamespace(config=ClientOptions(), measurements=SimpleNamespace(round_trips=dict))
        opener = StageOpener(swarm, inputs, ActiveAdapters(), expected_length=lambda: 8)
        opening = asyncio.create_task(opener.await_opened(stage, Outputs(0)))
        await asyncio.sleep(0.5)
        await stage.disconnect()
        await opening
        assert stage.needs_opening
        return asyncio.get_running_loop().time()

    assert virtual_time.run(act()) == pytest.approx(0.5)
