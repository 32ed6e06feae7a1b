"""What is sent over a slow line is packed after the first large message, and what is sent over a fast one is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import torch

from shoal.net.lines import MAX_LINES, Line, Lines
from shoal.net.memory import Frame, MemoryNetwork
from shoal.net.transport import Node, Stream
from shoal.net.wire import codec
from shoal.policy.network.goodput import MIN_SEEN, NUM_SEEN
from shoal.protocol import AnyMessage, Arrived, Downstream, Step, StepResult, Upstream
from shoal.server.rpc.pushing.push_service import PushService
from shoal.tensors import TensorSpec

from . import virtual_time

SLOW, FAST = 1e6, 1e12
"""Bytes per second. Packing the tensors below takes milliseconds, sending them raw half a second or nothing."""
HIDDEN = torch.randn(1, 256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
FEW = HIDDEN[:, :1]


class Two:
    """A client that asks a server, which sends the tensor back."""

    def __init__(self, client: Node, server: Node, network: MemoryNetwork) -> None:
        self.network = network
        self._client, self._server = client, server

    async def start(self, *, packs: bool | None) -> None:
        await self._server.transport.listen(_echo)
        self.stream = await self._client.transport.open("server")
        self._packs = packs

    async def learn(self) -> None:
        """Send so much that both know how fast the line is."""
        for _ in range(MIN_SEEN):
            await self.ask()

    async def ask(self, hidden: torch.Tensor = HIDDEN) -> tuple[bool, bool]:
        """Whether the request was packed, and the answer. Both have the same bits as what was sent."""
        seen: list[AnyMessage] = []

        def see(frame: Frame) -> Frame:
            seen.append(codec.decode(frame.header, bytearray(frame.payload))[0])
            return frame

        self.network.on_frame = see
        await codec.send(self.stream, Step(position=0), {"hidden": hidden}, packs=self._packs)
        _, answer = await codec.receive(self.stream)
        assert torch.equal(answer["hidden"], hidden)
        request, result = ((spec,) for (spec,) in (message.tensors for message in seen))
        return _is_packed(request), _is_packed(result)


def _is_packed(specs: tuple[TensorSpec]) -> bool:
    return specs[0].packed is not None


async def _echo(stream: Stream) -> None:
    while True:
        _, tensors = await codec.receive(stream)
        await codec.send(stream, StepResult(), {"hidden": tensors["hidden"]})


def with_two(
    scene: Callable[[Two], Coroutine[Any, Any, None]], *, packs: bool | None = True, up: float, down: float
) -> None:
    """A scene between a client and a server, whose line carries these bytes per second, in virtual time."""

    async def run() -> None:
        network = MemoryNetwork()
        two = Two(network.node("client"), network.node("server"), network)
        network.limit("client", up=up, down=down)
        await two.start(packs=packs)
        await scene(two)
        await network.close()

    virtual_time.run(run())


def test_a_slow_line_is_packed_in_both_directions_once_it_is_measured() -> None:
    async def scene(two: Two) -> None:
        for _ in range(MIN_SEEN):
            assert await two.ask() == (False, False)
        assert 0.8 * SLOW < two.network.line("server", "client").goodput < SLOW
        for _ in range(3):
            assert await two.ask() == (True, True)

    with_two(scene, up=SLOW, down=SLOW)


def test_a_fast_line_stays_raw() -> None:
    async def scene(two: Two) -> None:
        for _ in range(4):
            assert await two.ask() == (False, False)

    with_two(scene, up=FAST, down=FAST)


def test_each_direction_is_decided_by_itself() -> None:
    async def scene(two: Two) -> None:
        await two.learn()
        assert await two.ask() == (True, False)

    with_two(scene, up=SLOW, down=FAST)


def test_a_line_that_becomes_fast_is_raw_again() -> None:
    async def scene(two: Two) -> None:
        await two.learn()
        assert await two.ask() == (True, True)
        two.network.limit("client", up=FAST, down=FAST)
        for _ in range(NUM_SEEN):
            await two.ask()
        assert await two.ask() == (False, False)

    with_two(scene, up=SLOW, down=SLOW)


def test_a_line_that_becomes_slow_is_packed() -> None:
    async def scene(two: Two) -> None:
        for _ in range(NUM_SEEN):
            assert await two.ask() == (False, False)
        two.network.limit("client", up=SLOW, down=SLOW)
        for _ in range(NUM_SEEN):
            await two.ask()
        assert await two.ask() == (True, True)

    with_two(scene, up=FAST, down=FAST)


def test_single_tokens_are_raw_where_packing_gains_less_than_it_costs() -> None:
    async def scene(two: Two) -> None:
        await two.learn()
        assert await two.ask() == (True, True)
        assert await two.ask(FEW) == (False, False)

    with_two(scene, up=12.5e6, down=12.5e6)


def test_a_client_that_wants_no_packing_gets_none() -> None:
    async def scene(two: Two) -> None:
        for _ in range(3):
            assert await two.ask() == (False, False)
        assert not two.stream.line.is_told

    with_two(scene, packs=False, up=SLOW, down=SLOW)


def test_a_peer_that_says_nothing_of_packing_gets_none() -> None:
    async def scene(two: Two) -> None:
        for _ in range(3):
            assert await two.ask() == (False, False)

    with_two(scene, packs=None, up=SLOW, down=SLOW)


def pushed_packed(num_steps: int, *, packs: bool) -> list[bool]:
    """Which of some steps one server pushes packed to another, over a slow line."""

    async def run() -> list[bool]:
        network, link = MemoryNetwork(), "0" * 32
        up, down = (PushService(network.node(name).transport) for name in ("up", "down"))
        packed, answers, came = list[bool](), list[AnyMessage](), asyncio.Event()

        async def listen(stream: Stream) -> None:
            step, tensors = await codec.receive(stream)
            assert isinstance(step, Step)
            await down.receive_pushes(stream, step, tensors, check=lambda message: None, idle_seconds=60.0)

        def see(frame: Frame) -> Frame:
            message = codec.decode(frame.header, bytearray(frame.payload))[0]
            (packed.append(_is_packed(message.tensors)) if isinstance(message, Step) else answers.append(message))
            return frame

        def inbox(step: Step, tensors: codec.Tensors) -> None:
            assert torch.equal(tensors["hidden"], HIDDEN)
            came.set()

        network.on_frame = see
        network.limit("up", up=SLOW)
        await down.transport.listen(listen)
        down.expect(Upstream(peer="up", link=link), inbox)
        async with up.running(), down.running():
            handle = up.handle_to(Downstream(peer="down", link=link, packs=packs or None))
            assert handle is not None
            for position in range(num_steps):
                handle.push(Step(position=position, link=link), {"hidden": HIDDEN}, "raw", done=lambda sent: None)
                await came.wait()
                came.clear()
                await asyncio.sleep(0.01)  # virtual time
        await network.close()
        assert {type(each) for each in answers} <= {Arrived}
        assert bool(answers) == packs
        return packed

    return virtual_time.run(run())


def test_a_server_hears_how_fast_its_pushes_arrive_and_packs_them() -> None:
    assert pushed_packed(4, packs=True) == [False] * MIN_SEEN + [True] * 2


def test_a_server_packs_no_pushes_to_one_that_unpacks_nothing() -> None:
    assert pushed_packed(3, packs=False) == [False, False, False]


def test_what_a_peer_tells_is_about_its_own_line_only() -> None:
    lines = Lines()
    lines.to("a").told(1000)
    assert lines.to("a").packs("bfloat16", 1 << 20)
    assert not lines.to("b").packs("bfloat16", 1 << 20)


def test_a_peer_that_has_measured_nothing_wants_packing_and_changes_nothing() -> None:
    line = Line()
    line.told(0)
    assert line.is_told
    assert not line.shared.packs("bfloat16", 1 << 20)
    line.told(1000)
    line.told(0)
    assert line.shared.packs("bfloat16", 1 << 20)


def test_a_client_that_wants_no_packing_gets_none_beside_one_of_the_same_peer_that_does() -> None:
    async def scene(two: Two) -> None:
        await two.learn()
        assert await two.ask() == (True, True)
        await two.start(packs=False)
        for _ in range(2):
            assert await two.ask() == (False, False)

    with_two(scene, up=SLOW, down=SLOW)


def test_the_lines_of_peers_that_come_and_go_are_forgotten() -> None:
    lines = Lines()
    lines.to("first").told(1000)
    for number in range(MAX_LINES):
        lines.to(str(number))
    assert not lines.to("first").packs("bfloat16", 1 << 20)
