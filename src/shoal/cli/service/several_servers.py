"""Servers as processes of one command: one for each device, and only while the machine is idle, if that is wanted.

There is a process for each device, because a server is one event loop and one compute thread, and an error on one
device leaves the others alone. A server that ends is started again while others of the command are there. If none is
left, the command ends with an error. A server that has to wait for an idle machine is no process at all meanwhile: so
its owner has all of the memory.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from shoal.cli.service.devices import Share, as_arguments
from shoal.cli.service.others_use import OthersUse
from shoal.cli.terminal.console import WRONG_USAGE, WrongUsage, print_error, stderr, waiting
from shoal.cli.terminal.notify import notify
from shoal.host.computer import usable_cores
from shoal.host.processes import Child, Children, interruptible
from shoal.joining.invite_code import is_code
from shoal.policy.idleness import Idleness

RESTART_SECONDS = 15.0
"""How long after its end a server is started again, as the unit for systemd has it."""
LOOK_SECONDS = 1.0
"""How often it is looked at what the servers do, and at what else this machine does."""
START_SECONDS = 1e6
"""How long a server may take to start: a model that is not here yet is downloaded first. It shows what it does."""
CODE = "SHOAL_CODE"
"""The variable by which a server is given the invite code that takes the place of a model."""
LEAVE_SECONDS = 15.0
"""How long servers may take to end beside the time that their sessions have to move elsewhere."""


class When(StrEnum):
    """When a command serves."""

    always = "always"
    idle = "idle"


@dataclass
class Member:
    """One server: its process, whether that ever served, and when it is started again, if it is."""

    share: Share
    child: Child
    has_served: bool = False
    again_at: float | None = None

    @property
    def is_there(self) -> bool:
        return not self.child.has_ended


class Servers:
    """The servers of one command, as processes of `children`.

    `peers` are the addresses by which they join. If the swarm `is_new`, the first one starts it, and the others join by
    its address, once it serves.
    """

    def __init__(
        self,
        children: Children,
        shares: Sequence[Share],
        *,
        is_new: bool,
        peers: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._children = children
        self._peers = tuple(peers)
        self._is_new = is_new
        self._clock = clock
        self.members: list[Member] = []
        self.first = self._start(shares[0])
        self._waiting = list(shares[1:])
        if not is_new:
            self.start_others()

    def start_others(self) -> None:
        """Start those that have waited for the first one to serve."""
        while self._waiting:
            self._start(self._waiting.pop(0))

    def tend(self) -> None:
        """Note which servers serve and which have ended, and start those again whose time has come.

        To be called now and then. Raises `SwarmError` when none is left, and `WrongUsage` if the last one to end found
        its options wrong.
        """
        for member in self.members:
            member.has_served |= member.child.is_ready
            if member.child.has_ended and member.again_at is None:
                self._note_end(member)
            elif member.again_at is not None and self._clock() >= member.again_at and self._may_return(member):
                member.child, member.again_at = self._process(member.share), None
        if self.first.is_there and self.first.child.is_ready:
            self.start_others()

    def _start(self, share: Share) -> Member:
        member = Member(share, self._process(share))
        self.members.append(member)
        return member

    def _may_return(self, member: Member) -> bool:
        """Whether one that has ended may be started: not if it never served, nor if it would start a second swarm."""
        return member.has_served and (not self._is_new or bool(self._addresses()))

    def _addresses(self) -> list[str]:
        """The addresses of those that serve."""
        return [each.child.facts["address"] for each in self.members if each.is_there and each.child.is_ready]

    def _process(self, share: Share) -> Child:
        ways = [*self._peers, *self._addresses()]
        options = as_arguments({**share.values, "new_swarm": self._is_new and not ways, "initial_peers": ways})
        if is_code(share.model):  # who has it can join, and all users of a machine can read the arguments
            return self._children.start(share.mark, "serve", *options, environment={CODE: share.model})
        return self._children.start(share.mark, "serve", share.model, *options)

    def _note_end(self, member: Member) -> None:
        member.again_at = self._clock() + RESTART_SECONDS
        failure = member.child.failure()
        if not any(each.is_there for each in self.members):
            if member.child.process.returncode == WRONG_USAGE:
                raise WrongUsage(str(failure), hint=failure.hint)
            raise failure
        again = f", and it is started again in {RESTART_SECONDS:.0f} s" if member.has_served else ""
        print_error(f"{failure}; the others go on{again}", failure.hint)


def run_servers(
    shares: Sequence[Share], *, is_new: bool, peers: Sequence[str], when: When, drain_seconds: float
) -> None:
    """Run a server for each share until Ctrl-C or SIGTERM. Then let all of them leave politely.

    A second signal ends them at once. Raises `SwarmError` when none is left.
    """
    gate = Gate() if when is When.idle else None
    leave_seconds = drain_seconds + LEAVE_SECONDS
    with (
        contextlib.suppress(KeyboardInterrupt),  # which is how this command is meant to end
        interruptible() as check,
        Children(num_threads=None, tell=tell_marked if len(shares) > 1 else tell_plain) as children,
    ):
        try:
            while True:
                if gate is not None:
                    gate.wait(check)
                servers = Servers(children, shares, is_new=is_new, peers=peers)
                told: dict[str, str] = {}
                while gate is None or gate.is_open():
                    servers.tend()
                    if (now := _state(servers)) != told:
                        told = now
                        notify(**now)
                    children.wait_for_news(LOOK_SECONDS)
                    check()
                stderr.print("this machine is used: leaving the swarm until it is idle again", style="dim")
                _leave(children, seconds=leave_seconds)
        except KeyboardInterrupt:
            notify(STOPPING="1", STATUS="Leaving the swarm")
            stderr.print("leaving the swarm; a second Ctrl-C quits immediately", style="dim")
            _leave(children, seconds=leave_seconds)
            raise


class Gate:
    """Open while this machine is idle (`shoal.policy.idleness`). To be asked again and again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._use = OthersUse()
        self._idleness = Idleness(usable_cores())

    def is_open(self) -> bool:
        """Whether it is idle at this moment."""
        self._idleness = self._idleness.looked(self._clock(), self._use.look())
        return self._idleness.is_idle

    def wait(self, check: Callable[[], None]) -> None:
        """Wait until it is idle, and call `check` meanwhile."""
        task = f"Waiting until other programs use less than {self._idleness.limit / 2:.2g} cores for a while"
        with waiting(task) as reporter:
            notify(READY="1")  # it does what it was started for
            while not self.is_open():
                used = self._idleness.used_lately
                reporter.show(task, step="" if used is None else f"{used:.2g} now")
                time.sleep(LOOK_SECONDS)
                check()


def tell_plain(_: Child, line: str, is_error: bool) -> None:
    """Print a line of the only server, to the stream that it was written to, as it is."""
    stream = sys.stderr if is_error else sys.stdout
    with contextlib.suppress(OSError, ValueError):  # its reader has gone; the server goes on
        stream.write(f"{line}\n")
        stream.flush()


def tell_marked(child: Child, line: str, is_error: bool) -> None:
    """Print a line of a server with its mark, to the stream that it was written to."""
    if line.strip():
        tell_plain(child, f"[{child.name}] {line}", is_error)


def _state(servers: Servers) -> dict[str, str]:
    """What systemd is told: the service is ready when the first server is, and which servers serve."""
    serving = [each.share.mark for each in servers.members if each.is_there and each.child.is_ready]
    if not serving:
        return {"STATUS": "Starting the servers"}
    return {"READY": "1", "STATUS": f"Serving on {', '.join(serving)}" if len(servers.members) > 1 else "Serving"}


def _leave(children: Children, *, seconds: float) -> None:
    """Ask all processes to leave, and wait until they have, for `seconds` at most."""
    there = [child for child in children.running if not child.has_ended]
    for child in there:
        child.process.terminate()
    until = time.monotonic() + seconds
    while not all(child.has_ended for child in there) and time.monotonic() < until:
        children.wait_for_news(LOOK_SECONDS)
    for child in [child for child in children.running if child.has_ended]:
        children.forget(child)
