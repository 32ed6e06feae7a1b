"""The servers of one command: how they enter the swarm, and what becomes of the others when one of them ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shoal.cli.service.devices import Share
from shoal.cli.service.several_servers import CODE, RESTART_SECONDS, Servers, tell_marked
from shoal.cli.terminal.console import WrongUsage
from shoal.errors import SwarmError
from shoal.joining.invite_code import InviteCode, Way


class FakeChild:
    """A process that serves, and ends, when the test says so."""

    def __init__(self, name: str, arguments: tuple[str, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.facts: dict[str, str] = {}
        self.has_ended = False
        self.process = SimpleNamespace(returncode=None)

    @property
    def is_ready(self) -> bool:
        return "address" in self.facts

    def serve(self, address: str) -> None:
        self.facts["address"] = address

    def end(self, status: int) -> None:
        self.has_ended, self.process.returncode = True, status

    def failure(self) -> SwarmError:
        return SwarmError(f"{self.name} ended with status {self.process.returncode}", hint="its hint")


class Scene:
    """The servers of a command with three devices, and a clock."""

    def __init__(self, *, is_new: bool, peers: tuple[str, ...] = (), model: str = "m") -> None:
        self.started: list[FakeChild] = []
        self.environment: dict[str, str] | None = None
        self.time = 0.0
        children: Any = SimpleNamespace(start=self._start)
        shares = [Share(mark, model, {"device": "cpu", "mark": mark}) for mark in ("cpu0", "cpu1", "cpu2")]
        self.servers = Servers(children, shares, is_new=is_new, peers=peers, clock=lambda: self.time)

    def _start(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> FakeChild:
        self.started.append(FakeChild(name, arguments))
        self.environment = environment
        return self.started[-1]

    @property
    def names(self) -> list[str]:
        return [child.name for child in self.started]


def test_servers_that_join_are_started_together() -> None:
    scene = Scene(is_new=False, peers=("P", "Q"))
    assert scene.names == ["cpu0", "cpu1", "cpu2"]
    for child in scene.started:
        assert child.arguments[:2] == ("serve", "m")
        assert child.arguments[-5:] == ("--no-new-swarm", "--initial-peers", "P", "--initial-peers", "Q")


def test_a_code_is_not_among_the_arguments_which_all_users_of_a_machine_can_read() -> None:
    code = str(InviteCode("0123456789abcdef", (Way("203.0.113.5", 31337),)))
    scene = Scene(is_new=False, model=code)
    assert code not in scene.started[0].arguments
    assert scene.environment == {CODE: code}


def test_the_first_starts_the_swarm_and_the_others_join_it_once_it_serves() -> None:
    scene = Scene(is_new=True)
    scene.servers.tend()
    assert scene.names == ["cpu0"]
    assert "--new-swarm" in scene.started[0].arguments
    scene.started[0].serve("A")
    scene.servers.tend()
    assert scene.names == ["cpu0", "cpu1", "cpu2"]
    assert scene.started[2].arguments[-3:] == ("--no-new-swarm", "--initial-peers", "A")


def test_a_server_that_ends_is_named_the_others_go_on_and_it_is_started_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scene = Scene(is_new=True)
    scene.started[0].serve("A")
    scene.servers.tend()
    scene.started[1].serve("B")
    scene.servers.tend()
    scene.started[0].end(-9)
    scene.servers.tend()
    assert "cpu0 ended with status -9; the others go on, and it is started again in 15 s" in capsys.readouterr().err
    scene.time = RESTART_SECONDS - 1
    scene.servers.tend()
    assert scene.names == ["cpu0", "cpu1", "cpu2"]
    scene.time = RESTART_SECONDS
    scene.servers.tend()
    assert scene.names == ["cpu0", "cpu1", "cpu2", "cpu0"]
    assert scene.started[3].arguments[-3:] == ("--no-new-swarm", "--initial-peers", "B")  # no second swarm
    assert capsys.readouterr().err == ""


def test_the_first_server_starts_no_second_swarm_while_the_others_are_on_their_way() -> None:
    scene = Scene(is_new=True)
    scene.started[0].serve("A")
    scene.servers.tend()
    scene.started[0].end(-9)
    scene.servers.tend()
    scene.time = 2 * RESTART_SECONDS
    scene.servers.tend()
    assert scene.names == ["cpu0", "cpu1", "cpu2"]
    scene.started[1].serve("B")
    scene.servers.tend()
    assert scene.names == ["cpu0", "cpu1", "cpu2", "cpu0"]
    assert scene.started[3].arguments[-3:] == ("--no-new-swarm", "--initial-peers", "B")


def test_a_server_that_joined_and_ended_finds_the_swarm_by_the_others_too() -> None:
    scene = Scene(is_new=False, peers=("P",))
    scene.started[0].serve("A")
    scene.started[1].serve("B")
    scene.servers.tend()
    scene.started[0].end(1)
    scene.servers.tend()
    scene.time = RESTART_SECONDS
    scene.servers.tend()
    assert scene.started[3].arguments[-5:] == ("--no-new-swarm", "--initial-peers", "P", "--initial-peers", "B")


def test_a_server_that_never_served_is_named_and_not_started_again(capsys: pytest.CaptureFixture[str]) -> None:
    scene = Scene(is_new=False, peers=("P",))
    scene.started[1].end(1)
    scene.servers.tend()
    err = capsys.readouterr().err
    assert "error: cpu1 ended with status 1; the others go on\nhint: its hint" in err
    scene.time = 10 * RESTART_SECONDS
    scene.servers.tend()
    assert len(scene.started) == 3


@pytest.mark.parametrize(("status", "kind"), [(1, SwarmError), (2, WrongUsage)])
def test_without_any_server_the_command_ends_as_the_last_one_did(
    status: int, kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Scene(is_new=False, peers=("P",))
    for child in scene.started[:2]:
        child.end(1)
        scene.servers.tend()
    scene.started[2].end(status)
    with pytest.raises(kind, match=f"cpu2 ended with status {status}"):
        scene.servers.tend()
    assert capsys.readouterr().err.count("the others go on") == 2


def test_a_swarm_whose_first_server_cannot_start_is_an_error_at_once() -> None:
    scene = Scene(is_new=True)
    scene.started[0].end(1)
    with pytest.raises(SwarmError, match="cpu0 ended with status 1"):
        scene.servers.tend()
    assert scene.names == ["cpu0"]


def test_lines_are_marked_and_go_where_the_server_wrote_them(capsys: pytest.CaptureFixture[str]) -> None:
    child: Any = FakeChild("cuda1", ())
    tell_marked(child, "blocks    [4:8]", False)
    tell_marked(child, "", False)
    tell_marked(child, "a warning", True)
    assert capsys.readouterr() == ("[cuda1] blocks    [4:8]\n", "[cuda1] a warning\n")
