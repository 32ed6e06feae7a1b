"""What `shoal up` finds wrong before it starts anything, and what it makes of its two processes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from shoal.bundled import STORIES
from shoal.cli import run, up
from shoal.cli.terminal.notify import NOTIFY_SOCKET
from shoal.errors import SwarmError


class NoChildren:
    """Stands in for `Children` where none may be started."""

    def __init__(self, **_: Any) -> None: ...

    def __enter__(self) -> Self:
        pytest.fail("it starts processes")

    def __exit__(self, *_: object) -> None: ...


class FakeChildren:
    """Children that are ready at once. The second one ends while it starts: with `status`, or by an interrupt."""

    running: tuple[()] = ()
    status: int | None = None

    def __init__(self, **_: Any) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, name: str, *_: str, environment: dict[str, str] | None = None) -> Any:
        return SimpleNamespace(
            name=name,
            facts={"address": "A"},
            process=SimpleNamespace(returncode=None if name == "server" else self.status),
        )

    def wait_for(self, children: list[Any], *, seconds: float) -> Iterator[list[Any]]:
        if children[0].name == "gateway":
            if self.status is None:
                raise KeyboardInterrupt
            raise SwarmError(f"gateway ended with status {self.status}", hint="the hint of the gateway")
        yield []


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """What systemd is told next."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        monkeypatch.setenv(NOTIFY_SOCKET, str(tmp_path / "notify"))
        yield lambda: receiver.recv(4096).decode()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--blocks", "all"], "not a span of blocks: 'all'"),
        (["--host", "localhost"], "not an IP address to listen on: 'localhost'"),
        (["--api-key", "a b"], "a key with a space"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_started(
    options: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(up, "Children", NoChildren)
    assert run(["up", str(STORIES), *options]) == 2
    assert f"error: {expected}" in capsys.readouterr().err


def test_a_port_of_the_page_that_is_taken_is_told_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(up, "Children", NoChildren)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["up", str(STORIES), "--http-port", port]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: port {port} of 127.0.0.1 cannot be used")
    assert hint == "hint: choose another one with --http-port, or 0"


@pytest.mark.parametrize("status", [1, 2])
def test_what_one_of_the_processes_finds_wrong_is_its_own_exit_status(
    status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeChildren, "status", status)
    monkeypatch.setattr(up, "Children", FakeChildren)
    assert run(["up", str(STORIES), "--http-port", "0"]) == status
    assert capsys.readouterr().err == ""  # the process has said what was wrong


def test_a_process_that_was_killed_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeChildren, "status", -9)
    monkeypatch.setattr(up, "Children", FakeChildren)
    assert run(["up", str(STORIES), "--http-port", "0"]) == 1
    assert "error: gateway ended with status -9\nhint: the hint of the gateway" in capsys.readouterr().err


def test_systemd_is_told_what_it_waits_for_and_that_it_stops(
    told: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "Children", FakeChildren)
    assert run(["up", str(STORIES), "--http-port", "0"]) == 0
    assert [told() for _ in range(3)] == [
        "STATUS=Starting the server",
        "STATUS=Starting the gateway",
        "STOPPING=1\nSTATUS=Leaving the swarm",
    ]
