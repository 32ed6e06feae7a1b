"""`shoal serve --when idle`, as a user runs it, on a machine whose other programs the test stands for."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shoal.bundled import STORIES
from shoal.host.processes import Child, Children
from shoal.testing.preloaded import PreloadedProcess

from .watched_command import SECONDS, WatchedCommand

PROGRAM = """
import sys
from pathlib import Path
from shoal.cli import main
from shoal.cli.service import several_servers
from shoal.policy import idleness

class OthersUse:
    used = 0.0
    def look(self):
        self.used += float(Path(sys.argv[1]).read_text())
        return self.used

several_servers.OthersUse = OthersUse
idleness.IDLE_SECONDS = 2.0
idleness.BUSY_SECONDS = 2.0
main(sys.argv[2:])
"""
"""The command, with what others use from a file: seconds of a core, at each look. Its rule is ten times as quick."""


@pytest.fixture(scope="module")
def founder(cache: Path) -> Iterator[Child]:
    """A server of another machine, by which the one under test joins."""
    with Children(grace_seconds=SECONDS) as children:
        arguments = ("--new-swarm", "--host", "127.0.0.1", "--dtype", "float32", "--blocks", "0:6")
        child = children.start("founder", "serve", str(STORIES), *arguments, launch=PreloadedProcess)
        for _ in children.wait_for([child], seconds=SECONDS):
            pass
        yield child


def test_a_server_joins_when_the_machine_is_idle_leaves_when_it_is_used_and_joins_again(
    founder: Child, tmp_path: Path
) -> None:
    use = tmp_path / "use"

    def others_use(cores: float) -> None:
        (tmp_path / "next").write_text(str(cores))
        (tmp_path / "next").replace(use)  # in one step: the command reads it all the time

    others_use(1.0)
    serve = ("serve", str(STORIES), "--initial-peers", founder.facts["address"], "--host", "127.0.0.1")
    program = (sys.executable, "-c", PROGRAM, str(use))
    machine = WatchedCommand(*serve, "--when", "idle", "--blocks", "6:12", "--name", "laptop", program=program)
    try:
        machine.line(r"Waiting until other programs use less than 0.25 cores for a while: \S+ now")
        assert machine.children() == []
        others_use(0.0)
        machine.line(r"^blocks +6:12")
        (server,) = machine.children()
        others_use(1.0)
        machine.line("^this machine is used: leaving the swarm until it is idle again")
        psutil.wait_procs([server], timeout=SECONDS)
        assert not server.is_running()
        seen = len(machine.lines)
        others_use(0.0)
        machine.line(r"^blocks +6:12", after=seen)
        machine.process.send_signal(signal.SIGINT)
        assert machine.process.wait(SECONDS) == 0
    finally:
        machine.end()
