"""A server announces its swarm from the time that it can invite others until it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.cli.nearby.announce_swarm import announce_swarm
from shoal.joining.invitation import Invitation
from shoal.joining.invite_code import InviteCode, Way
from shoal.joining.keep_announced import LOOK_SECONDS
from shoal.spans import Span

from . import virtual_time
from .lan_in_memory import HOME, LanInMemory

PEER = "12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"
INVITATION = Invitation("stories", "llama-12x64-1a2b3c4d", "f" * 32, "float32", "none")
NEAR, FAR = f"/ip4/192.168.1.9/tcp/1/p2p/{PEER}", f"/ip4/203.0.113.9/tcp/1/p2p/{PEER}"


class Scene:
    """A server on a local network, whose invitation is not there yet."""

    def __init__(self) -> None:
        self.lan = LanInMemory()
        self.invitation: asyncio.Future[Invitation] = asyncio.get_running_loop().create_future()
        self.info = SimpleNamespace(addresses=(f"/ip4/192.168.1.5/tcp/4001/p2p/{PEER}",), span=Span(0, 6))

    @property
    def server(self) -> Any:
        model = SimpleNamespace(num_blocks=12)
        return SimpleNamespace(info=self.info, invitation=self.invitation, model=model)


def play(
    act: Callable[[Scene], Awaitable[None]], *, by: Sequence[str] = (), asked: bool | None = None
) -> tuple[Scene, bool]:
    """The scene after this has happened and the server has ended; and whether it had given up announcing before."""

    async def run() -> tuple[Scene, bool]:
        scene = Scene()
        work = announce_swarm(scene.server, by, asked=asked, lan=scene.lan, own=lambda: [HOME])
        task = asyncio.create_task(work)
        await act(scene)
        has_ended = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return scene, has_ended

    return virtual_time.run(run())


async def invites(scene: Scene) -> None:
    """The server has read its weights, and serves for a while."""
    await asyncio.sleep(10 * LOOK_SECONDS)
    assert scene.lan.attempts == 0
    scene.invitation.set_result(INVITATION)
    await asyncio.sleep(LOOK_SECONDS)


def test_a_server_announces_its_swarm_once_it_can_invite(capsys: pytest.CaptureFixture[str]) -> None:
    async def act(scene: Scene) -> None:
        await invites(scene)
        assert list(scene.lan.records) == ["me"]

    scene, has_ended = play(act)
    (said,) = scene.lan.published
    assert said.code == InviteCode(INVITATION.digest, (Way("192.168.1.5", 4001),))
    assert (said.model, str(said.span), said.num_blocks) == ("stories", "0:6", 12)
    assert scene.lan.records == {}
    assert not has_ended
    assert capsys.readouterr().out.startswith("lan       announced in 192.168.1.0/24: ")


@pytest.mark.parametrize(
    ("by", "asked", "is_announced"),
    [([NEAR], None, True), ([FAR], None, False), ([FAR], True, True), ([], False, False)],
)
def test_the_swarm_of_another_place_is_not_announced_here_unless_the_user_asks(
    by: list[str], asked: bool | None, is_announced: bool
) -> None:
    scene, has_ended = play(invites, by=by, asked=asked)
    assert len(scene.lan.published) == is_announced
    assert has_ended is not is_announced


@pytest.mark.parametrize(("asked", "warnings"), [(None, 0), (True, 1)])
def test_a_server_for_this_machine_only_is_not_announced(
    asked: bool | None, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(scene: Scene) -> None:
        scene.info.addresses = (f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}",)
        await invites(scene)

    with caplog.at_level(logging.WARNING, logger="shoal"):
        scene, has_ended = play(act, asked=asked)
    assert scene.lan.attempts == 0
    assert has_ended
    assert len(caplog.records) == warnings


def test_a_defect_is_logged_and_ends_no_server(caplog: pytest.LogCaptureFixture) -> None:
    async def act(scene: Scene) -> None:
        scene.invitation.set_exception(RuntimeError("a defect"))
        await asyncio.sleep(LOOK_SECONDS)

    with caplog.at_level(logging.ERROR, logger="shoal"):
        _, has_ended = play(act)
    assert has_ended
    assert [record.getMessage() for record in caplog.records] == ["this swarm is not announced on the local network"]
