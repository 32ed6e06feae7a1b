"""shoal as a service: what it tells systemd, the unit, and the files of the documentation."""

from __future__ import annotations

import configparser
import inspect
import logging
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from shoal import progress_log
from shoal.cli import LONG_RUNNING
from shoal.cli.serve import command as serve
from shoal.cli.service.config_file import read_config, with_config_file
from shoal.cli.terminal import console
from shoal.cli.terminal.console import ProgressReporter, start_logging, waiting
from shoal.cli.terminal.notify import NOTIFY_SOCKET, notify
from shoal.progress_log import MIN_LINE_SECONDS, ByteLines

REPOSITORY = Path(__file__).parents[2]
UNIT = REPOSITORY / "docs" / "service" / "shoal.service"
COMMANDS = {module.__name__.rpartition(".")[2]: module.command for module in LONG_RUNNING}
SECONDS = 60.0
"""The limit for a process that never ends."""


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Stands in for systemd: returns the next datagram that it was sent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        monkeypatch.setenv(NOTIFY_SOCKET, str(tmp_path / "notify"))
        yield lambda: receiver.recv(4096).decode()


def test_systemd_is_told_a_state_in_its_own_form(systemd: Callable[[], str]) -> None:
    notify(READY="1", STATUS="Serving\nblocks 0:4")
    assert systemd() == "READY=1\nSTATUS=Serving blocks 0:4"


def test_a_socket_with_an_abstract_name_is_told_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = f"shoal-{tmp_path.name}-notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        receiver.setblocking(False)
        monkeypatch.setenv(NOTIFY_SOCKET, f"@{name}")
        notify(READY="1")
        assert receiver.recv(100) == b"READY=1"


@pytest.mark.parametrize("place", ["", "relative", "/there/is/no/socket"])
def test_without_systemd_nothing_happens(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NOTIFY_SOCKET, place)
    notify(READY="1")


def test_each_step_of_the_start_is_a_status(systemd: Callable[[], str]) -> None:
    reporter = ProgressReporter()
    reporter.show("Loading the blocks", step="2 of 8")
    assert systemd() == "STATUS=Loading the blocks: 2 of 8"
    reporter.stop()


def test_a_service_that_is_told_to_stop_says_that_it_stops(systemd: Callable[[], str]) -> None:
    script = (
        "import asyncio, os, signal\nfrom shoal.cli.service.long_running import run_until_signalled\n"
        "async def work():\n    os.kill(os.getpid(), signal.SIGTERM)\n    await asyncio.Event().wait()\n"
        "run_until_signalled(work())"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=SECONDS)
    assert systemd() == "STOPPING=1\nSTATUS=Leaving the swarm"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Starts the log of a command without a terminal, which ends with the test."""
    monkeypatch.delenv("SHOAL_LOG", raising=False)
    logger = logging.getLogger("shoal")
    before = logger.handlers, logger.level, logger.propagate
    yield lambda: start_logging(verbose=False, default="warning", progress=True)
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
    console.PROGRESS.setLevel(logging.NOTSET)


def test_a_task_that_blocks_its_thread_is_still_reminded_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(progress_log, "REMINDER_SECONDS", 0.0)
    reminded = threading.Event()
    monkeypatch.setattr(console.PROGRESS, "info", lambda form, line: "(for 0 s)" in line and reminded.set())
    with waiting("Importing PyTorch and Transformers"):
        assert reminded.wait(SECONDS)


def test_bytes_that_come_are_lines_in_the_log(log: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    log()
    now = 0.0
    lines = ByteLines("Downloading a.safetensors", total=3_000_000_000, come=500_000_000, clock=lambda: now)
    for _ in range(25):
        now += MIN_LINE_SECONDS / 10
        lines.advance(100_000_000)
    shown = [line.partition(" INFO shoal.progress: ")[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == [
        "Downloading a.safetensors: 1,500 of 3,000 MB",
        "Downloading a.safetensors: 2,500 of 3,000 MB",
    ]
    lines = ByteLines("Downloading b.safetensors", total=0, clock=lambda: now)  # of a size that the hub does not say
    now += MIN_LINE_SECONDS
    lines.advance(100_000_000)
    assert capsys.readouterr().err.endswith(": Downloading b.safetensors: 100 MB\n")


def unit() -> configparser.ConfigParser:
    """The unit of the documentation."""
    parser = configparser.ConfigParser(interpolation=None, delimiters="=", comment_prefixes="#", strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def test_systemd_accepts_the_unit_as_it_is_printed(tmp_path: Path) -> None:
    program = unit()["Service"]["ExecStart"].split()[0]
    text = UNIT.read_text().replace(program, shutil.which("true") or "/bin/true")  # which is looked for
    (tmp_path / UNIT.name).write_text(text)
    analyze = shutil.which("systemd-analyze")
    if analyze is None:  # on macOS, and in small containers
        assert set(unit()) == {"DEFAULT", "Unit", "Service", "Install"}
        return
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / UNIT.name)], capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_gives_a_server_the_time_to_leave_and_tells_it_alone_to_stop() -> None:
    service = unit()["Service"]
    drain_seconds = inspect.signature(serve).parameters["drain_timeout"].default
    assert float(service["TimeoutStopSec"]) >= drain_seconds + 20
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "mixed")
    assert (service["Type"], service["TimeoutStartSec"], service["Restart"]) == ("notify", "infinity", "on-failure")
    assert {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"} == set(service["RestrictAddressFamilies"].split())


def context_of(name: str) -> typer.Context:
    app = typer.Typer()
    app.command()(with_config_file(COMMANDS[name]))
    return typer.Context(typer.main.get_command(app), info_name=f"shoal {name}")


def test_the_command_of_the_unit_and_its_file_are_ones_that_shoal_takes() -> None:
    _, name, *arguments = unit()["Service"]["ExecStart"].split()
    config = read_config(UNIT.with_suffix(".toml"), context_of(name))
    assert config.values["model"]
    taken = {each for parameter in context_of(name).command.params for each in parameter.opts}
    assert {each for each in arguments if each.startswith("--")} <= taken


def toml_blocks() -> list[tuple[str, str]]:
    """The TOML in the documentation, each with the command that its first line names."""
    found = []
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        for text in re.findall(r"^```toml\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            match = re.match(r"# .*`?shoal (\w+) --config", text)
            assert match is not None, f"{page.name}: the first line says which command takes this file"
            found.append((match[1], text))
    return found


def test_every_file_of_options_in_the_documentation_is_taken(tmp_path: Path) -> None:
    blocks = toml_blocks()
    assert blocks
    for name, text in blocks:
        path = tmp_path / "documented.toml"
        path.write_text(text)
        path.chmod(0o600)
        assert read_config(path, context_of(name)).values
