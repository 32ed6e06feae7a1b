"""A swarm of `shoal serve` processes, each behind a door whose link can be shaped and broken."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from shoal.processes import Child, Children
from shoal.testing.churn import Act
from shoal.testing.link import Link
from shoal.testing.network import Network, Traffic
from shoal.testing.reach import HOST, ProxyCommand

START_SECONDS = 180.0
END_SECONDS = 60.0
"""What a server gets for ending after it was told to, or its daemon after it was killed."""
STOPPED_SECONDS = 0.001
"""So often it is looked whether a process has been stopped."""

# A process that is stopped cannot notice that we are gone. So somebody else waits for that, and lets it go on.
_HANG = 'kill -STOP "$1"; echo; read -r _; kill -CONT "$1" 2>/dev/null'


class ShapedServer:
    """A server of a `ShapedSwarm`: it can be ended and started again, and so can its link.

    It keeps its name, its blocks, its identity and its address over restarts, and forgets everything else.
    """

    def __init__(self, swarm: ShapedSwarm, name: str, span: str, options: Sequence[str], link: Link) -> None:
        self.name = name
        self.span = span
        self.peer = ""
        self._swarm = swarm
        self._options = options
        self._port = _free_port()
        self._proxy = swarm.network.open_door(self._port, link, link)
        self._starts = itertools.count()
        self._child: Child | None = None
        self._family: list[psutil.Process] = []
        self._hanging: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where others dial it: its door."""
        return f"/ip4/{HOST}/tcp/{self._proxy}/p2p/{self.peer}"

    @property
    def process(self) -> subprocess.Popen[str]:
        """The process of its last start."""
        assert self._child is not None
        return self._child.process

    @property
    def is_running(self) -> bool:
        return self._child is not None and self.process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it runs and has said that it serves; it may hang, or be cut off."""
        return self._child is not None and self._child.is_ready and self.is_running

    @property
    def log(self) -> str:
        """What it has said since its last start."""
        return "" if self._child is None else self._child.log.read_text(errors="replace")

    # Its process.

    def start(self) -> None:
        """Start it; `wait_until_ready` says when it serves."""
        start = next(self._starts)
        children = self._swarm.children
        self._child = children.start(
            *(f"{self.name}.{start}" if start else self.name, "serve", self._swarm.model, "--name", self.name),
            *("--blocks", self.span, "--device", "cpu", "--host", HOST, "--port", str(self._port)),
            *("--announce", f"/ip4/{HOST}/tcp/{self._proxy}", "--identity", str(children.folder / self.name)),
            *self._swarm.how_to_join(self),
            *self._options,
        )

    def wait_until_ready(self) -> None:
        """Raises `SwarmError` if it ends instead."""
        assert self._child is not None
        for _ in self._swarm.children.wait_for([self._child], seconds=START_SECONDS):
            pass
        self.peer = self._child.facts["peer"]

    def kill(self) -> None:
        """End it with SIGKILL; its streams end a moment later, when its daemon notices."""
        self._remember_family()
        self.process.kill()
        self.process.wait()
        self.resume()

    def stop(self, *, wait: bool = True) -> None:
        """Tell it to leave, with SIGTERM, and wait until it has."""
        self._remember_family()
        self.process.terminate()
        self.resume()
        if wait:
            self.process.wait(END_SECONDS)

    def restart(self, *, wait: bool = True) -> None:
        """Start it again, and wait until it serves. If it runs it is killed before, if it is leaving it may."""
        if self.is_running and not self._family:
            self.kill()
        self._bury()
        self.start()
        if wait:
            self.wait_until_ready()

    def hang(self) -> None:
        """Stop it with SIGSTOP: it computes nothing and says nothing, but the system keeps its connections."""
        if self._hanging is None and self.is_running:
            command = ["/bin/sh", "-c", _HANG, "hang", str(self.process.pid)]
            self._hanging = subprocess.Popen(  # noqa: S603 - our own words
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            assert self._hanging.stdout is not None
            self._hanging.stdout.readline()
            process = psutil.Process(self.process.pid)
            while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                time.sleep(STOPPED_SECONDS)

    def resume(self) -> None:
        """Let it go on after `hang`."""
        if self._hanging is not None:
            self._hanging.communicate()
            self._hanging = None

    # Its network.

    def link(self, inward: Link, outward: Link | None = None) -> None:
        """Shape what comes to it and what it sends, which is the same unless said, for those who have dialled it."""
        self._swarm.network.link(self._port, inward, inward if outward is None else outward)

    def cut(self) -> None:
        """Reset all its connections, also those that it dialled, and refuse new ones until `heal`."""
        self._swarm.network.set_reach(self._port, ProxyCommand.CUT)

    def black_hole(self) -> None:
        """Let nothing through in either direction, and tell nobody, until `heal`."""
        self._swarm.network.set_reach(self._port, ProxyCommand.BLACK_HOLE)

    def heal(self) -> None:
        """Undo `cut` and `black_hole`. What was held back arrives."""
        self._swarm.network.set_reach(self._port, ProxyCommand.OPEN)

    @property
    def traffic(self) -> Traffic:
        """What has passed its door."""
        return self._swarm.network.traffic(self._port)

    def _remember_family(self) -> None:
        """Whom it has started: its daemon, and who watches that."""
        if self.is_running:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._family = psutil.Process(self.process.pid).children(recursive=True)

    def _bury(self) -> None:
        """Wait until it has ended, and those that it had started, who have its port."""
        self.process.wait(END_SECONDS)
        psutil.wait_procs(self._family, timeout=END_SECONDS)
        self._family = []


class ShapedSwarm:
    """Servers on this machine and the network between them. Made by `shaped_swarm`."""

    def __init__(self, model: str, children: Children, network: Network) -> None:
        self.model = model
        self.children = children
        self.network = network
        self.servers: list[ShapedServer] = []

    @property
    def address(self) -> str:
        """The first server's, to join by."""
        return self.servers[0].address

    @property
    def addresses(self) -> list[str]:
        """Everybody's, to join by while some of them are away."""
        return [server.address for server in self.servers]

    def add(self, span: str, *options: str, link: Link | None = None) -> ShapedServer:
        """One more server; `start` it."""
        server = ShapedServer(self, f"s{len(self.servers)}", span, options, link or Link())
        self.servers.append(server)
        return server

    def do(self, server: int, act: Act) -> None:
        """What an `Event` says, without waiting for what comes of it."""
        method = getattr(self.servers[server], act.value)
        if act in (Act.STOP, Act.RESTART):
            method(wait=False)
        else:
            method()

    def wait_until_ready(self) -> None:
        """Until all servers that were started, and not ended, serve. Raises `SwarmError` if one ends instead."""
        for server in self.servers:
            if server.is_running:
                server.wait_until_ready()

    def how_to_join(self, newcomer: ShapedServer) -> tuple[str, ...]:
        """What a server is told that starts: by whom to join, or that it is the first."""
        others = [each.address for each in self.servers if each is not newcomer and each.is_running and each.peer]
        return ("--initial-peers", *others) if others else ("--new-swarm",)


@contextlib.contextmanager
def shaped_swarm(
    model: str | Path,
    spans: Sequence[str],
    *,
    link: Link | None = None,
    options: Sequence[str] = (),
    of_last: Sequence[str] = (),
    num_threads: int | None = 1,
) -> Iterator[ShapedSwarm]:
    """A server for each span, all of which serve when this is entered and are gone when it is left.

    `link` is that of every server, in both directions. All servers have the same `options` of `shoal serve`; the last
    one has those `of_last` as well. `num_threads` is how many threads each computes with; None leaves it to PyTorch.
    """
    with Network() as network, Children(num_threads=num_threads) as children:
        swarm = ShapedSwarm(str(model), children, network)
        try:
            for span in spans:
                own = of_last if len(swarm.servers) == len(spans) - 1 else ()
                swarm.add(span, *options, *own, link=link)
            first, *others = swarm.servers
            first.start()
            first.wait_until_ready()
            for server in others:
                server.start()
            swarm.wait_until_ready()
            yield swarm
        finally:
            for server in swarm.servers:
                server.resume()


def _free_port() -> int:
    """A port on which nobody listens now, as the system chooses it."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
