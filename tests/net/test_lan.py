"""Two machines on a local network of their own: `shoal join` in one hears the swarm of the other.

The machines are network namespaces, with multicast DNS as it is. A namespace lasts as long as a process in it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from shoal.bundled import STORIES
from shoal.testing.namespaces import missing_for_namespaces

pytestmark = pytest.mark.skipif(missing_for_namespaces() is not None, reason=str(missing_for_namespaces()))

SECONDS = 120.0
"""The limit for a wait. A test that reaches it fails."""
LAN_PEER = Path(__file__).with_name("lan_peer.py")
SHOAL = (sys.executable, "-m", "shoal")


class Machine:
    """A network namespace. Commands run in it; those that `start` are ended with the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        # It ends when its stdin does: with this process at the latest, and the namespace with it.
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        stack.enter_context(holder)
        assert holder.stdin is not None
        stack.callback(holder.stdin.close)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"  # it is in its namespace now
        self.pid = holder.pid
        self.run("ip", "link", "set", "lo", "up")

    @property
    def _inside(self) -> tuple[str, str]:
        return "nsenter", f"--net=/proc/{self.pid}/ns/net"

    def run(self, *command: str, status: int = 0) -> str:
        """Run a command without a terminal. Returns its stdout, and its stderr after that."""
        done = subprocess.run(
            [*self._inside, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, *command: str) -> Process:
        """Start a command."""
        process = subprocess.Popen(
            [*self._inside, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._stack.callback(_end, process)
        return Process(process)


class Process:
    """A process that prints lines, and may be told to end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self, start: str) -> str:
        """The next line that begins so. Other lines before it are skipped. It is killed if none comes in time."""
        assert self.process.stdout is not None
        deadline = threading.Timer(SECONDS, self.process.kill)
        deadline.start()
        try:
            for line in self.process.stdout:
                if line.startswith(start):
                    return line.strip()
        finally:
            deadline.cancel()
        raise AssertionError(f"it has ended with status {self.process.wait()} and has not printed {start!r}")

    def go_on(self) -> None:
        """Give it the line of stdin for which it waits."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def interrupt(self) -> int:
        """Press Ctrl-C. Returns its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(SECONDS)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@contextmanager
def two_machines(*addresses: tuple[str, str]) -> Iterator[tuple[Machine, Machine]]:
    """Two machines that are joined by a cable, with these addresses at its ends."""
    with ExitStack() as stack:
        first, second = Machine(stack), Machine(stack)
        cable = ["ip", "link", "add", "eth0", "netns", str(first.pid), "type", "veth"]
        subprocess.run([*cable, "peer", "name", "eth0", "netns", str(second.pid)], check=True)
        for machine, own in zip((first, second), zip(*addresses, strict=True), strict=True):
            machine.run("ip", "link", "set", "eth0", "up")
            for each in own:
                machine.run("ip", "address", "add", each, "dev", "eth0", *(["nodad"] if ":" in each else []))
        yield first, second


HOME = ("10.77.0.1/24", "10.77.0.2/24")
HOME_IPV6 = ("fd77::1/64", "fd77::2/64")
OUTSIDE = ("203.0.113.1/24", "203.0.113.2/24")


@pytest.mark.parametrize("addresses", [HOME, HOME_IPV6])
def test_what_a_machine_announces_is_heard_by_another_until_it_takes_it_back(addresses: tuple[str, str]) -> None:
    with two_machines(addresses) as (first, second):
        member = first.start(sys.executable, str(LAN_PEER), "announce", addresses[0].partition("/")[0])
        member.line("6")
        said = "says it is stories-6, float32: 1 member heard; they lack blocks 6:12\n"
        assert second.run(sys.executable, str(LAN_PEER), "listen") == said
        member.go_on()
        member.line("12")
        said = "says it is stories-12, float32: 1 member heard\n"
        assert second.run(sys.executable, str(LAN_PEER), "listen") == said
        member.go_on()
        assert member.process.wait(SECONDS) == 0
        assert second.run(sys.executable, str(LAN_PEER), "listen") == ""


def test_a_machine_outside_of_the_local_network_is_not_answered() -> None:
    with two_machines(HOME, OUTSIDE) as (first, second):
        member = first.start(sys.executable, str(LAN_PEER), "announce", "10.77.0.1")
        member.line("6")
        outside, inside = ("203.0.113.2", "203.0.113.1"), ("10.77.0.2", "10.77.0.1")
        answers = second.run(sys.executable, str(LAN_PEER), "ask", *outside, *inside).split()
        assert int(answers[0]) > 0
        assert answers[1:] == ["nothing"]


def test_a_machine_joins_the_swarm_that_it_hears_and_is_heard_itself() -> None:
    options = ("--no-move", "--cache-tokens", "4096")
    with two_machines(HOME) as (first, second):
        assert "no swarm is heard on the local network (10.77.0.0/24)" in second.run(*SHOAL, "join", status=1)

        start = ("serve", str(STORIES), "--new-swarm", "--blocks", "0:6", "--dtype", "float32")
        server = first.start(*SHOAL, *start, *options)
        server.line("lan ")
        listed = second.run(*SHOAL, "join", status=2)
        assert "stories, float32: 1 member heard; they lack blocks 6:12\n     shoal join " in listed
        assert "error: which swarm? stdin is not a terminal" in listed

        joined = second.start(*SHOAL, "join", "--yes", "--num-blocks", "6", *options)
        assert joined.line("blocks").split() == ["blocks", "6:12"]
        joined.line("lan ")
        assert first.run(sys.executable, str(LAN_PEER), "check") == "stories, float32: 2 members heard\n"

        assert server.interrupt() == 0
        heard = first.run(sys.executable, str(LAN_PEER), "listen")
        assert heard == "says it is stories, float32: 1 member heard; they lack blocks 0:6\n"
        assert joined.interrupt() == 0
